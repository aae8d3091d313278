/* Makes each system call whose number is given, with arguments that can do no harm, and prints "number errno" a line.
 * An argument may be NUMBER:A0 to choose the first argument; all others are -1. 0 means that the call succeeded. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *first = strchr(argv[i], ':');
        long a0 = first ? strtol(first + 1, NULL, 0) : -1;
        errno = 0;
        long r = syscall(atol(argv[i]), a0, -1L, -1L, -1L, -1L, -1L);
        printf("%s %d\n", argv[i], r == -1 ? errno : 0);
        fflush(stdout);
    }
    return 0;
}
