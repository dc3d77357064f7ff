#include <gtest/gtest.h>
#include <natten/natten.h>

#include <functional>
#include <new>
#include <string>
#include <vector>

namespace natten_tests {
namespace {

using natten::Call;
using natten::Context;
using natten::ErrorKind;
using natten::Problem;
using natten::Status;
using natten::Tensors;
using natten::TensorView;

/// A call over 64 tokens, and the memory behind it.
struct Example {
  std::vector<float> in, out, lse;
  Call call;

  Example() : in(64 * 2 * 4, 0.5f), out(in.size(), -1.0f), lse(64 * 2) {
    call.neighborhood.kernel_size = {3};
    Tensors& t = call.tensors;
    t.query = t.key = t.value = natten::view(in.data(), {1, 64, 2, 4});
    t.output = natten::view(out.data(), {1, 64, 2, 4});
    t.logsumexp = natten::view(lse.data(), {1, 64, 2});
  }
  bool is_written() const { return out[0] == 0.5f; }
};

/// That a function fails as its twin, which throws, does.
void expect_same_failure(const Status& status, const std::function<void()>& twin) {
  EXPECT_FALSE(status.ok());
  try {
    twin();
    ADD_FAILURE() << "the function that throws accepts it";
  } catch (const natten::Error& error) {
    EXPECT_EQ(status.kind(), error.kind());
    EXPECT_STREQ(status.message(), error.what());
  }
}

TEST(StatusOf, WhatSucceeds) {
  Example example;
  EXPECT_TRUE(natten::try_run(example.call).ok());
  EXPECT_TRUE(example.is_written());
  Example listed;
  const Status status = natten::try_run(std::vector<Call>{listed.call});
  EXPECT_TRUE(status.ok());
  EXPECT_STREQ(status.message(), "");
  EXPECT_TRUE(listed.is_written());

  Problem problem;
  EXPECT_TRUE(natten::try_describe(example.call, problem).ok());
  EXPECT_EQ(problem.queries(), 64);
  std::size_t bytes = 1, list_bytes = 1;
  EXPECT_TRUE(natten::try_workspace_bytes(example.call, bytes).ok());
  EXPECT_EQ(bytes, natten::workspace_bytes(example.call));
  EXPECT_TRUE(natten::try_workspace_bytes(std::vector<Call>{example.call}, list_bytes).ok());
  EXPECT_EQ(list_bytes, bytes);
  TensorView view;
  EXPECT_TRUE(natten::try_expected(example.call, &Tensors::logsumexp, view).ok());
  EXPECT_EQ(view.size(), 128);

  Example merged;
  EXPECT_TRUE(
      natten::try_merge_attentions({example.call.tensors.output}, {example.call.tensors.logsumexp},
                                   merged.call.tensors.output, merged.call.tensors.logsumexp)
          .ok());
  EXPECT_EQ(merged.out, example.out);
  Example gradient;
  EXPECT_TRUE(natten::try_merge_attentions_backward(
                  {example.call.tensors.output}, {example.call.tensors.logsumexp},
                  example.call.tensors.query, TensorView{}, {gradient.call.tensors.output},
                  {gradient.call.tensors.logsumexp})
                  .ok());
  EXPECT_EQ(gradient.out, example.in) << "of one set, the gradient passes through";
}

TEST(StatusOf, WhatIsRefused) {
  Example example;
  Call wrong = example.call;
  wrong.neighborhood.kernel_size = {65};
  const std::vector<Call> list{wrong};
  Context unknown;
  unknown.backend = "abacus";
  expect_same_failure(natten::try_run(wrong), [&] { natten::run(wrong); });
  expect_same_failure(natten::try_run(list), [&] { natten::run(list); });
  expect_same_failure(natten::try_run(example.call, unknown),
                      [&] { natten::run(example.call, unknown); });
  EXPECT_FALSE(example.is_written());

  Problem problem;
  problem.rank = 7;
  expect_same_failure(natten::try_describe(wrong, problem), [&] { natten::describe(wrong); });
  EXPECT_EQ(problem.rank, 7) << "written although the call was refused";
  std::size_t bytes = 5;
  expect_same_failure(natten::try_workspace_bytes(wrong, bytes),
                      [&] { natten::workspace_bytes(wrong); });
  expect_same_failure(natten::try_workspace_bytes(list, bytes),
                      [&] { natten::workspace_bytes(list); });
  EXPECT_EQ(bytes, 5u);
  TensorView view;
  expect_same_failure(natten::try_expected(example.call, &Tensors::attn, view),
                      [&] { natten::expected(example.call, &Tensors::attn); });
  EXPECT_FALSE(bool(view));

  wrong = example.call;
  wrong.tensors.key.dtype = natten::DType::float64;
  const Status type = natten::try_run(wrong);
  EXPECT_EQ(type.kind(), ErrorKind::invalid_type);
  expect_same_failure(type, [&] { natten::run(wrong); });

  const TensorView& out = example.call.tensors.output;
  const TensorView& lse = example.call.tensors.logsumexp;
  expect_same_failure(natten::try_merge_attentions({}, {}, out, lse),
                      [&] { natten::merge_attentions({}, {}, out, lse); });
  expect_same_failure(natten::try_merge_attentions_backward({}, {}, out, lse, {}, {}),
                      [&] { natten::merge_attentions_backward({}, {}, out, lse, {}, {}); });
}

/// An executor whose failure is not the library's.
struct FailingExecutor : natten::Executor {
  std::function<void()> fail;
  int concurrency() const override {
    fail();
    return 1;
  }
  void schedule(std::function<void()>) override {}
};

TEST(StatusOf, ExceptionsOfAllKinds) {
  FailingExecutor executor;
  Context context;
  context.executor = &executor;
  const auto message_of = [&](std::function<void()> fail) {
    executor.fail = std::move(fail);
    Example example;
    // Much enough that the executor is asked.
    std::vector<float> in(1 << 17), out(1 << 17);
    example.call.neighborhood.kernel_size = {101};
    example.call.tensors.query = example.call.tensors.key = example.call.tensors.value =
        natten::view(in.data(), {1, 1 << 11, 2, 32});
    example.call.tensors.output = natten::view(out.data(), {1, 1 << 11, 2, 32});
    example.call.tensors.logsumexp = {};
    const Status status = natten::try_run(example.call, context);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.kind(), ErrorKind::runtime);
    return std::string(status.message());
  };
  EXPECT_EQ(message_of([] { throw std::bad_alloc(); }), "out of memory");
  EXPECT_EQ(message_of([] { throw std::runtime_error("the pool is closed"); }),
            "the pool is closed");
  EXPECT_EQ(message_of([] { throw 3; }), "an exception that is not a std::exception");
}

TEST(StatusOf, CopiesKeepTheMessage) {
  Example example;
  example.call.neighborhood.kernel_size = {65};
  Status last;
  EXPECT_TRUE(last.ok());
  std::string message;
  {
    const Status first = natten::try_run(example.call);
    message = first.message();
    last = first;
  }
  EXPECT_EQ(last.message(), message);
  EXPECT_NE(message.find("kernel_size"), std::string::npos) << message;
}

TEST(Version, OfHeadersAndLibrary) {
  EXPECT_STREQ(natten::version(), NATTEN_VERSION);
  EXPECT_EQ(std::to_string(NATTEN_VERSION_MAJOR) + "." + std::to_string(NATTEN_VERSION_MINOR) +
                "." + std::to_string(NATTEN_VERSION_PATCH),
            NATTEN_VERSION);
}

}  // namespace
}  // namespace natten_tests
