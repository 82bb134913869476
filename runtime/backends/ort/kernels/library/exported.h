// The mark of functions that the library shows to others.
#pragma once

#if defined(_WIN32)
#define LVLM_EXPORT extern "C" __declspec(dllexport)
#else
#define LVLM_EXPORT extern "C" __attribute__((visibility("default")))
#endif
