// Which signatures this library has: library.py asks before it calls anything else.
#include <cstdint>

#include "export.h"

EXPORT int32_t penstock_abi() { return 2; }
