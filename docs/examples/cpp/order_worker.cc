// An order in C++: a step, a wait for an event, and the end, on a client that protoc generates from proto/.
//
//     make -C docs/examples/cpp && docs/examples/cpp/build/order_worker [ORDERS]
//
// Without ORDERS it works for ever.

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "absurd/v1/absurd_service.grpc.pb.h"

namespace absurd_v1 = absurd::v1;
using absurd_v1::ClaimedTask;
using google::protobuf::Struct;

static constexpr int kLease = 60;
static std::string queue = "default";

static std::string environment(const char* name, const std::string& otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}

// JSON objects as protobuf's own Struct. It holds numbers as doubles: fine for this example, not for large integers.
static Struct parse(const std::string& text) {
  Struct object;
  if (!google::protobuf::util::JsonStringToMessage(text, &object).ok()) throw std::runtime_error("not a JSON object");
  return object;
}

static std::string text(const Struct& object) {
  std::string out;
  (void)google::protobuf::util::MessageToJsonString(object, &out);
  return out;
}

// A call failed: the run is not ours any more, or the server is away. Nothing is reported; the lease ends by itself.
struct CallFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The run sleeps, and the claim is over.
struct Suspended {};

static void check(const grpc::Status& status) {
  if (!status.ok()) throw CallFailed(status.error_message());
}

class Worker {
 public:
  explicit Worker(const std::shared_ptr<grpc::Channel>& channel) : absurd_(absurd_v1::AbsurdService::NewStub(channel)) {
    std::random_device random;
    session_ = "cpp-" + std::to_string(random()) + std::to_string(random());
  }

  // Holds one stream to its end, or until so many orders are done; negative: for ever.
  void work(long& left) {
    grpc::ClientContext context;
    absurd_v1::ClaimStreamRequest request;
    request.set_queue(queue);
    request.set_worker_id("cpp:" + std::to_string(getpid()));
    request.set_session_id(session_);
    request.mutable_claim_timeout()->set_seconds(kLease);
    auto stream = absurd_->ClaimStream(&context, request);
    absurd_v1::ClaimStreamResponse response;
    while (left != 0 && stream->Read(&response)) {
      if (response.has_opened()) std::cout << "ready" << std::endl;
      if (response.has_task() && carry_out(response.task()) && left > 0) --left;
    }
    context.TryCancel();
    const grpc::Status status = stream->Finish();
    if (left != 0 && !status.ok()) std::cerr << status.error_message() << std::endl;
  }

 private:
  // The stored value of the step; the first time, what the action returns.
  Struct step(const ClaimedTask& task, const std::string& name, const std::function<Struct()>& action) {
    for (const auto& checkpoint : task.checkpoints()) {
      if (checkpoint.checkpoint_name() == name) return parse(checkpoint.state().text());
    }
    const Struct value = action();
    grpc::ClientContext context;
    absurd_v1::SetCheckpointRequest request;
    request.set_queue(queue);
    request.set_claim_token(task.claim_token());
    request.set_checkpoint_name(name);
    request.mutable_state()->set_text(text(value));
    request.mutable_extend_by()->set_seconds(kLease);
    absurd_v1::SetCheckpointResponse response;
    check(absurd_->SetCheckpoint(&context, request, &response));
    return value;
  }

  // The payload of the event, when it is there.
  Struct await_event(const ClaimedTask& task, const std::string& name, const std::string& event) {
    grpc::ClientContext context;
    absurd_v1::AwaitEventRequest request;
    request.set_queue(queue);
    request.set_claim_token(task.claim_token());
    request.set_step_name(name);
    request.set_event_name(event);
    request.mutable_timeout()->set_seconds(86400);
    absurd_v1::AwaitEventResponse response;
    check(absurd_->AwaitEvent(&context, request, &response));
    if (response.has_payload()) return parse(response.payload().text());
    if (response.has_suspended()) throw Suspended();
    throw std::runtime_error(event + " did not come in time");
  }

  // The task. It runs from its beginning each time; what is stored is not done again.
  Struct fulfil(const ClaimedTask& task) {
    const std::string order = parse(task.params().text()).fields().at("order_id").string_value();
    Struct result = step(task, "charge", [&] {
      std::cout << "charged " << order << std::endl;
      Struct payment;
      (*payment.mutable_fields())["payment"].set_string_value("pay-" + order);
      return payment;
    });
    result.MergeFrom(await_event(task, "await-shipment", "shipment.packed:" + order));
    (*result.mutable_fields())["by"].set_string_value("c++");
    return result;
  }

  // Runs one task and reports how it went; says whether it has ended.
  bool carry_out(const ClaimedTask& task) {
    try {
      grpc::ClientContext context;
      absurd_v1::CompleteTaskRequest request;
      request.mutable_result()->set_text(text(fulfil(task)));
      request.set_queue(queue);
      request.set_claim_token(task.claim_token());
      absurd_v1::CompleteTaskResponse response;
      check(absurd_->CompleteTask(&context, request, &response));
      std::cout << "completed " << task.task_id() << std::endl;
      return true;
    } catch (const Suspended&) {
      std::cout << "suspended " << task.task_id() << std::endl;
    } catch (const CallFailed& error) {
      std::cerr << task.task_id() << ": " << error.what() << std::endl;
    } catch (const std::exception& error) {
      fail(task, error.what());
    }
    return false;
  }

  void fail(const ClaimedTask& task, const std::string& message) {
    Struct reason;
    (*reason.mutable_fields())["name"].set_string_value("OrderError");
    (*reason.mutable_fields())["message"].set_string_value(message);
    grpc::ClientContext context;
    absurd_v1::FailTaskRequest request;
    request.set_queue(queue);
    request.set_claim_token(task.claim_token());
    request.mutable_reason()->set_text(text(reason));
    absurd_v1::FailTaskResponse response;
    const grpc::Status status = absurd_->FailTask(&context, request, &response);
    if (!status.ok()) std::cerr << task.task_id() << ": " << status.error_message() << std::endl;
  }

  std::unique_ptr<absurd_v1::AbsurdService::Stub> absurd_;
  std::string session_;
};

int main(int argc, char** argv) {
  std::string url = environment("ABSURD_URL", "http://127.0.0.1:50051");
  queue = environment("ABSURD_DEFAULT_QUEUE", queue);
  if (url.rfind("http://", 0) == 0) url = url.substr(7);
  long left = argc > 1 ? std::strtol(argv[1], nullptr, 10) : -1;
  Worker worker(grpc::CreateChannel(url, grpc::InsecureChannelCredentials()));
  while (left != 0) {
    worker.work(left);
    if (left != 0) std::this_thread::sleep_for(std::chrono::seconds(1));
  }
  return 0;
}
