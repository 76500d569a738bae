// What every source of the native library begins with: its functions have C names and are the only ones seen outside.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
