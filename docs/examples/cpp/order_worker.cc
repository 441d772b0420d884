// An order in C++: a step, a wait for an event, and the end, on a client that protoc generates from proto/.
//
//     make -C docs/examples/cpp && docs/examples/cpp/build/order_worker [ORDERS]
//
// Without ORDERS it works for ever. The parcel of each order contains the text of the file that GREETING names. An order
// with the field `replaces` cancels the task that it names.

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "absurd/v1/absurd_service.grpc.pb.h"

namespace absurd_v1 = absurd::v1;
using absurd_v1::ClaimedTask;
using google::protobuf::Struct;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

static constexpr seconds kLease{60};
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
  const auto status = google::protobuf::util::MessageToJsonString(object, &out);
  if (!status.ok()) throw std::runtime_error("no JSON value: " + status.ToString());
  return out;
}

// The member of an object; an exception when there is none.
static std::string member(const Struct& object, const std::string& name) {
  const auto found = object.fields().find(name);
  if (found == object.fields().end()) throw std::invalid_argument("no field " + name);
  return found->second.string_value();
}

static std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::system_error(errno, std::generic_category(), path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The claim is over: report nothing. It is no std::exception, so that a handler does not catch it by accident.
struct ClaimOver {
  std::string message = {};
};

// The run sleeps.
struct Suspended : ClaimOver {};

// The server refused a call of this worker. The same call would be refused again.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The server is away or busy. A repeated call has one effect.
static bool passing(grpc::StatusCode code) {
  return code == grpc::UNAVAILABLE || code == grpc::RESOURCE_EXHAUSTED || code == grpc::DEADLINE_EXCEEDED ||
         code == grpc::UNKNOWN || code == grpc::CANCELLED;
}

// One execution of a task: the calls that this worker makes about it.
class Run {
 public:
  Run(absurd_v1::AbsurdService::Stub& absurd, const ClaimedTask& task) : absurd(absurd), task(task) {}

  // Returns the stored value of the step. The first time, calls the action and stores its value.
  Struct step(const std::string& name, const std::function<Struct()>& action) {
    read_checkpoints();
    const auto found = stored_.find(name);
    if (found != stored_.end()) return parse(found->second);
    const Struct value = action();
    auto request = about<absurd_v1::SetCheckpointRequest>();
    request.set_checkpoint_name(name);
    request.mutable_state()->set_text(text(value));
    request.mutable_extend_by()->set_seconds(kLease.count());
    const auto begun = Clock::now();
    call<absurd_v1::SetCheckpointResponse>(&Stub::SetCheckpoint, request);
    lease_end_ = begun + kLease;
    stored_[name] = request.state().text();
    return value;
  }

  // Returns the payload of the event. While there is none, the run sleeps and this execution ends.
  Struct await_event(const std::string& name, const std::string& event) {
    auto request = about<absurd_v1::AwaitEventRequest>();
    request.set_step_name(name);
    request.set_event_name(event);
    request.mutable_timeout()->set_seconds(86400);
    const auto answer = call<absurd_v1::AwaitEventResponse>(&Stub::AwaitEvent, request);
    if (answer.has_payload()) return parse(answer.payload().text());
    if (answer.has_suspended()) throw Suspended();
    throw std::runtime_error(event + " did not come in time");
  }

  void complete(const Struct& result) {
    auto request = about<absurd_v1::CompleteTaskRequest>();
    request.mutable_result()->set_text(text(result));
    call<absurd_v1::CompleteTaskResponse>(&Stub::CompleteTask, request);
  }

  // Records a failure. The server cleans the reason and keeps 64 KiB of it.
  void fail(const std::string& message) {
    Struct reason;
    (*reason.mutable_fields())["name"].set_string_value("OrderError");
    (*reason.mutable_fields())["message"].set_string_value(message.substr(0, 10'000));
    auto request = about<absurd_v1::FailTaskRequest>();
    request.mutable_reason()->set_text(text(reason));
    call<absurd_v1::FailTaskResponse>(&Stub::FailTask, request);
  }

  absurd_v1::AbsurdService::Stub& absurd;
  const ClaimedTask& task;

 private:
  using Stub = absurd_v1::AbsurdService::Stub;

  template <typename Request>
  Request about() const {
    Request request;
    request.set_queue(queue);
    request.set_claim_token(task.claim_token());
    return request;
  }

  // Makes a call, and repeats it until the server answers or the lease ends.
  template <typename Response, typename Request>
  Response call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*), const Request& request) {
    for (milliseconds pause{100};; pause = std::min<milliseconds>(2 * pause, seconds(5))) {
      const auto left = lease_end_ - Clock::now();
      grpc::ClientContext context;
      context.set_deadline(std::chrono::system_clock::now() + std::clamp<Clock::duration>(left, seconds(1), seconds(10)));
      Response response;
      const grpc::Status status = (absurd.*method)(&context, request, &response);
      if (status.ok()) return response;
      const bool passes = passing(status.error_code());
      // ABORTED says that another claim owns the run. FailTask has the last word about every other refusal.
      if (status.error_code() == grpc::ABORTED || (passes && left < pause)) throw ClaimOver{status.error_message()};
      if (!passes) throw Refused(status.error_message());
      std::cerr << status.error_message() << "; trying again" << std::endl;
      std::this_thread::sleep_for(pause);
    }
  }

  // Reads the values of the steps that earlier executions stored.
  void read_checkpoints() {
    if (read_) return;
    for (const auto& stored : task.checkpoints()) stored_[stored.checkpoint_name()] = stored.state().text();
    absurd_v1::GetAllCheckpointsRequest request;
    request.set_queue(queue);
    request.set_run_id(task.run_id());
    for (bool more = !task.checkpoints_complete(); more; more = !request.page_token().empty()) {
      const auto page = call<absurd_v1::GetAllCheckpointsResponse>(&Stub::GetAllCheckpoints, request);
      for (const auto& stored : page.checkpoints()) stored_[stored.checkpoint_name()] = stored.state().text();
      request.set_page_token(page.next_page_token());
    }
    read_ = true;
  }

  Clock::time_point lease_end_ = Clock::now() + kLease;
  std::map<std::string, std::string> stored_;
  bool read_ = false;
};

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
    request.mutable_claim_timeout()->set_seconds(kLease.count());
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
  // The handler. It runs from its beginning each time; a stored step is not done again.
  static Struct fulfil(Run& run) {
    const Struct order = parse(run.task.params().text());
    const std::string id = member(order, "order_id");
    Struct result = run.step("charge", [&] {
      std::cout << "charged " << id << std::endl;
      Struct payment;
      (*payment.mutable_fields())["payment"].set_string_value("pay-" + id);
      return payment;
    });
    if (order.fields().contains("replaces")) cancel(run, member(order, "replaces"));
    result.MergeFrom(run.await_event("await-shipment", "shipment.packed:" + id));
    const std::string greeting = environment("GREETING", "");
    if (!greeting.empty()) (*result.mutable_fields())["greeting"].set_string_value(contents(greeting));
    (*result.mutable_fields())["by"].set_string_value("c++");
    return result;
  }

  // A call of the handler's own. Its errors are failures of the task, as those of any other service are.
  static void cancel(Run& run, const std::string& task_id) {
    grpc::ClientContext context;
    absurd_v1::CancelTaskRequest request;
    request.set_queue(queue);
    request.set_task_id(task_id);
    absurd_v1::CancelTaskResponse response;
    const grpc::Status status = run.absurd.CancelTask(&context, request, &response);
    if (!status.ok()) throw std::runtime_error("cannot cancel the order's task: " + status.error_message());
  }

  // Runs one task and reports how it went; says whether it is completed.
  bool carry_out(const ClaimedTask& task) {
    Run run(*absurd_, task);
    try {
      try {
        run.complete(fulfil(run));
        std::cout << "completed " << task.task_id() << std::endl;
        return true;
      } catch (const ClaimOver&) {
        throw;
      } catch (const std::exception& error) {
        // The handler failed, or the server refused a value that the handler made. Either way the attempt ends here.
        run.fail(error.what());
        std::cerr << "failed " << task.task_id() << ": " << error.what() << std::endl;
      } catch (...) {
        run.fail("the handler threw something that is no std::exception");
      }
    } catch (const Suspended&) {
      std::cout << "suspended " << task.task_id() << std::endl;
    } catch (const ClaimOver& error) {
      std::cerr << task.task_id() << ": " << error.message << std::endl;
    } catch (const std::exception& error) {
      std::cerr << task.task_id() << ": " << error.what() << std::endl;
    }
    return false;
  }

  std::unique_ptr<absurd_v1::AbsurdService::Stub> absurd_;
  std::string session_;
};

int main(int argc, char** argv) {
  std::string url = environment("ABSURD_URL", "http://127.0.0.1:50051");
  queue = environment("ABSURD_DEFAULT_QUEUE", queue);
  if (url.rfind("http://", 0) == 0) url = url.substr(7);
  long left = argc > 1 ? std::strtol(argv[1], nullptr, 10) : -1;
  // Without pings a dead connection is never noticed.
  grpc::ChannelArguments pings;
  pings.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  pings.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  pings.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  Worker worker(grpc::CreateCustomChannel(url, grpc::InsecureChannelCredentials(), pings));
  while (left != 0) {
    worker.work(left);
    if (left != 0) std::this_thread::sleep_for(seconds(1));
  }
  return 0;
}
