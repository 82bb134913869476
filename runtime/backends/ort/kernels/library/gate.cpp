// Gates, and their functions for who holds graphs (gates.py).
#include "gate.h"

#include <algorithm>
#include <thread>

#include "exported.h"

namespace lvlm {
namespace {
thread_local Gate* here_ = nullptr;
thread_local size_t made_ = 0;
}  // namespace

void count_kernel() { ++made_; }
size_t kernels_made() { return made_; }

Gate* Gate::here() { return here_; }

void Gate::enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    within_ = true;
    here_ = this;
}

void Gate::leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    within_ = waits_ = false;
    here_ = nullptr;
    changed_.notify_all();
}

void Gate::open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shut_ = waits_ = false;  // who waited is on the way, even if it has not woken yet
    ++opened_;
    changed_.notify_all();
}

bool Gate::shut() {
    std::unique_lock<std::mutex> lock(mutex_);
    shut_ = true;
    changed_.wait(lock, [&] { return !shut_ || !within_ || waits_; });
    return waits_;
}

void Gate::pass(const std::function<void(size_t, const std::function<void(size_t)>&)>& parallel) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!shut_) return;
    waits_ = true;
    changed_.notify_all();
    const size_t before = opened_;
    lock.unlock();
    // By the times it was opened: one that wakes when it is shut again goes on to the next kernel, as
    // the others, which have woken, wait for it, and as each opening is to bring a run further.
    parallel(std::max(1u, std::thread::hardware_concurrency()), [&](size_t) {
        std::unique_lock<std::mutex> held(mutex_);
        changed_.wait(held, [&] { return opened_ != before; });
    });
}

}  // namespace lvlm

LVLM_EXPORT lvlm::Gate* lvlm_gate_new() { return new lvlm::Gate; }
LVLM_EXPORT void lvlm_gate_free(lvlm::Gate* gate) { delete gate; }
LVLM_EXPORT void lvlm_gate_enter(lvlm::Gate* gate) { gate->enter(); }
LVLM_EXPORT void lvlm_gate_leave(lvlm::Gate* gate) { gate->leave(); }
LVLM_EXPORT void lvlm_gate_open(lvlm::Gate* gate) { gate->open(); }
LVLM_EXPORT bool lvlm_gate_shut(lvlm::Gate* gate) { return gate->shut(); }
// Kernels that this thread has made so far: those of a session are the difference to before it.
LVLM_EXPORT size_t lvlm_kernels_made() { return lvlm::kernels_made(); }
