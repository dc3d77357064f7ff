#pragma once

/// Everything libnatten offers.
#include <natten/attention.h>
#include <natten/backends.h>
#include <natten/build_info.h>
#include <natten/context.h>
#include <natten/error.h>
#include <natten/neighborhood.h>
#include <natten/operations.h>
#include <natten/problem.h>
#include <natten/roles.h>
#include <natten/simulate.h>
#include <natten/status.h>
#include <natten/tuner.h>
#include <natten/types.h>
#include <natten/version.h>
