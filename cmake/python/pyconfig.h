/* What Python's headers ask of a system, for those that `make wheels` builds modules for: 64 bits, little
   endian, Python built without debugging and with its lock. A system's own file has hundreds of lines
   more, for Python's sources. */
#ifndef Py_PYCONFIG_H
#define Py_PYCONFIG_H

#include <stdio.h> /* Python.h leaves it out for the stable ABI, and nanobind uses it */

#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_FLOAT 4
#define SIZEOF_DOUBLE 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_UINTPTR_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_PID_T 4
#define SIZEOF__BOOL 1
#define ALIGNOF_SIZE_T 8
#define ALIGNOF_MAX_ALIGN_T 16
#define DOUBLE_IS_LITTLE_ENDIAN_IEEE754 1
#define PYLONG_BITS_IN_DIGIT 30

#define HAVE_SSIZE_T 1
#define HAVE_STDDEF_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_WCHAR_H 1
#define HAVE_STD_ATOMIC 1
#define HAVE_BUILTIN_ATOMIC 1
#define HAVE_CLOCK_GETTIME 1
#define WITH_DOC_STRINGS 1
#define WITH_PYMALLOC 1

#ifdef _WIN32
#include <basetsd.h>

#define MS_WIN32 1
#define MS_WIN64 1
#define MS_WINDOWS 1
#define NT_THREADS 1
#define MS_COREDLL 1
#define Py_ENABLE_SHARED 1 /* names of Python are imported from its DLL */
#ifndef HAVE_DECLSPEC_DLL
#define HAVE_DECLSPEC_DLL 1
#endif
#define SIZEOF_LONG 4
#define SIZEOF_WCHAR_T 2
#else
#define SIZEOF_LONG 8
#define SIZEOF_WCHAR_T 4
#define SIZEOF_PTHREAD_T 8
#ifdef __APPLE__
#define SIZEOF_PTHREAD_KEY_T 8
#else
#define SIZEOF_PTHREAD_KEY_T 4
#define PTHREAD_KEY_T_IS_COMPATIBLE_WITH_INT 1
#endif
#define HAVE_PTHREAD_H 1
#define HAVE_FORK 1
#define HAVE_LANGINFO_H 1
#define HAVE_STAT_H 1
#define HAVE_SYS_SELECT_H 1
#define HAVE_SYS_TIME_H 1
#define HAVE_UNISTD_H 1
#endif

#endif /* Py_PYCONFIG_H */
