// The compiled path in one piece: each part by itself would compile the products anew.

#include "head.c"
#include "blocks.c"
