// The sources and the processor of this library, as CMakeLists.txt gives them.

#include "offramp.h"

const char *offramp_sources(void) { return OFFRAMP_SOURCES; }
const char *offramp_variant(void) { return OFFRAMP_VARIANT; }
