/* Open connections, have one message echoed on each, and hold them until standard input ends.
 *
 * The echo makes sure that the server has accepted every one of them and that its handler runs.
 * Prints the number of connections held once all of them are.
 */
#define _GNU_SOURCE
#include "measure.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define USAGE "hold PORT CONNECTIONS"

enum { SIZE = 64 };

static void echo(int descriptor, const char *message)
{
    char buffer[SIZE];
    if (write(descriptor, message, SIZE) != SIZE)
        broken("write: %s", strerror(errno));
    if (recv(descriptor, buffer, SIZE, MSG_WAITALL) != SIZE || memcmp(buffer, message, SIZE))
        broken("the reply is not what was sent");
}

int main(int count, char **values)
{
    expect_arguments(count, 3, USAGE);
    struct sockaddr_in server = loopback(1, argument("PORT", values[1], 1, 65535));
    int connections = argument("CONNECTIONS", values[2], 1, 100000);
    raise_descriptor_limit();

    char *message = lines(SIZE, SIZE);
    for (int i = 0; i < connections; i++) {
        int descriptor = socket(AF_INET, SOCK_STREAM, 0);
        if (descriptor < 0 || connect(descriptor, (struct sockaddr *)&server, sizeof server) < 0)
            broken("connection %d: %s", i + 1, strerror(errno));
        echo(descriptor, message); /* one at a time: no burst that a backlog would have to hold */
    }
    printf("%d\n", connections);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return EXIT_SUCCESS;
}
