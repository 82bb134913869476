// A gate: a run of a graph can be held at it between two nodes while other graphs have the cores. Every
// kernel passes the gate that its thread is within (op.h).
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>

namespace lvlm {

// Of this thread: a node with a kernel was made; how many there were.
void count_kernel();
size_t kernels_made();

class Gate {
public:
    // The one that this thread is within; null: none.
    static Gate* here();

    void enter();
    void leave();
    void open();
    // Returns when who is within waits, true then, or has left.
    bool shut();
    // Waits where it is shut, until it is opened. ``parallel``(count, task) runs tasks on the threads of the graph: they wait
    // as well, where they would look for work and take the time of others.
    void pass(const std::function<void(size_t, const std::function<void(size_t)>&)>& parallel);

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool shut_ = false, within_ = false, waits_ = false;
    size_t opened_ = 0;  // times
};

}  // namespace lvlm
