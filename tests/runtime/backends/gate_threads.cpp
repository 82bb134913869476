// A thread that passes a gate again and again, with a pool of its own, while another shuts and opens it:
// between shut and open nothing may go on. For the thread sanitizer.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "gate.h"

namespace {

constexpr int kPasses = 60000, kRounds = 4;

void parallel(size_t count, const std::function<void(size_t)>& task) {
    std::vector<std::thread> threads;
    for (size_t i = 1; i < count; ++i) threads.emplace_back([&task, i] { task(i); });
    task(0);
    for (std::thread& thread : threads) thread.join();
}

int round_of_it() {
    lvlm::Gate gate;
    std::atomic<int> passed{0};
    std::atomic<bool> done{false};
    std::thread within([&] {
        gate.enter();
        for (int i = 0; i < kPasses; ++i) {
            lvlm::Gate::here()->pass(parallel);
            for (volatile int work = 0; work < 200; work = work + 1) {
            }
            ++passed;
        }
        gate.leave();
        done = true;
    });
    int moved = 0, held = 0;
    while (!done) {
        gate.shut();
        const int before = passed;
        if (std::rand() % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
        moved += passed != before;
        held += before > 0 && before < kPasses;
        gate.open();
        if (std::rand() % 4 == 0) {  // before who waits has woken
            gate.shut();
            gate.open();
        }
    }
    within.join();
    std::printf("held %d times, moved %d times\n", held, moved);
    return moved == 0 && held > 0 ? 0 : 1;
}

}  // namespace

int main() {
    int failed = 0;
    for (int i = 0; i < kRounds; ++i) failed += round_of_it();
    return failed;
}
