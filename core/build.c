// What this library was made from, and for: CMakeLists.txt says so.

#include "offramp.h"

const char *offramp_sources(void) { return OFFRAMP_SOURCES; }
const char *offramp_variant(void) { return OFFRAMP_VARIANT; }
