// Gates, and their functions for who holds graphs (gates.py).
#include "gate.h"

#include <algorithm>
#include <thread>

#include "exported.h"

namespace lvlm {
namespace {
thread_local Gate* here_ = nullptr;
}

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

void Gate::shut() {
    std::unique_lock<std::mutex> lock(mutex_);
    shut_ = true;
    changed_.wait(lock, [&] { return !shut_ || !within_ || waits_; });
}

void Gate::pass(const std::function<void(size_t, const std::function<void(size_t)>&)>& parallel) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (shut_) {
        waits_ = true;
        changed_.notify_all();
        const size_t before = opened_;
        lock.unlock();
        // By the times it was opened: one that wakes late goes on even if it is shut again, as the
        // others, which have woken, wait for it.
        parallel(std::max(1u, std::thread::hardware_concurrency()), [&](size_t) {
            std::unique_lock<std::mutex> held(mutex_);
            changed_.wait(held, [&] { return opened_ != before; });
        });
        lock.lock();
    }
}

}  // namespace lvlm

LVLM_EXPORT lvlm::Gate* lvlm_gate_new() { return new lvlm::Gate; }
LVLM_EXPORT void lvlm_gate_free(lvlm::Gate* gate) { delete gate; }
LVLM_EXPORT void lvlm_gate_enter(lvlm::Gate* gate) { gate->enter(); }
LVLM_EXPORT void lvlm_gate_leave(lvlm::Gate* gate) { gate->leave(); }
LVLM_EXPORT void lvlm_gate_open(lvlm::Gate* gate) { gate->open(); }
LVLM_EXPORT void lvlm_gate_shut(lvlm::Gate* gate) { gate->shut(); }
