// What the C unit tests share: counting checks.
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

static int passed, failed;

// Counts one check; the first 30 failures are printed.
__attribute__((format(printf, 2, 3)))
static void check(bool ok, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    if (ok) passed++;
    else if (failed++ < 30) {
        printf("FAIL ");
        vprintf(fmt, ap);
        printf("\n");
    }
    va_end(ap);
}
