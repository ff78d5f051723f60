// The library names its sources by 16 hexadecimal digits, and its variant.

#include <string.h>

const char *offramp_sources(void);
const char *offramp_variant(void);

int main(void) {
    const char *sources = offramp_sources();
    return !(strlen(sources) == 16 && strspn(sources, "0123456789abcdef") == 16 && *offramp_variant());
}
