/* What every load generator shares: checked arguments, loopback addresses, the measured window.
 *
 * A generator keeps a fixed number of messages under way and never has more: the load is bounded
 * by its arguments, and it only ever talks to this machine.
 *
 * Exit codes: 0 measured; 1 the server broke the rules of the work; 2 an argument is wrong.
 */
#ifndef MEASURE_H
#define MEASURE_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { EXIT_BROKEN = 1, EXIT_USAGE = 2 };

enum { SECOND = 1000 * 1000 * 1000 }; /* in nanoseconds, the unit of every instant here */

/* Say what went wrong, as printf does, and end with EXIT_BROKEN. */
_Noreturn void broken(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The argument `text`, called `name`, as a whole number; ends with EXIT_USAGE outside least..most. */
long argument(const char *name, const char *text, long least, long most);

/* The argument `text`, called SECONDS, from 0.01 to 600. */
double duration(const char *text);

/* End with EXIT_USAGE unless the program was called with as many arguments as `usage` names. */
void expect_arguments(int given, int wanted, const char *usage);

/* Allow this process as many descriptors as its hard limit grants. */
void raise_descriptor_limit(void);

/* 127.0.0.1 and its neighbours up to 127.0.0.200, chosen by `host` 1..200. */
struct sockaddr_in loopback(int host, int port);

/* Memory filled with zeros; ends the program when there is none. */
void *allocate(size_t count, size_t size);

/* A message of `size` bytes that is lines of `line_size` bytes, newline included. */
char *lines(size_t size, size_t line_size);

/* Nanoseconds of the monotonic clock. */
int64_t now(void);

/* How long things took, in buckets that grow with the value: bounded, and within 1 % of it. */
enum { LATENCY_STEPS = 64, LATENCY_BUCKETS = 58 * LATENCY_STEPS };

/* The window in which messages count: it opens after a warm-up and lasts as long as asked.
 *
 * The processor time of the server is read at the two instants between which the messages are
 * counted, so that start, connecting and warm-up are in neither.
 */
struct measurement {
    pid_t server;
    int64_t opens, closes;
    bool open;
    int64_t processor;
    int64_t messages, failures;
    int64_t latencies[LATENCY_BUCKETS];
};

/* Begin the warm-up; the window closes `seconds` after it. */
void measurement_begin(struct measurement *measurement, double seconds, pid_t server);

/* Open or close the window when it is time; false once it has closed. */
bool measurement_goes_on(struct measurement *measurement);

/* Count a message that took from `since` until now; return now. */
int64_t measurement_count(struct measurement *measurement, int64_t since);

/* Print the result as one line of JSON. */
void measurement_report(const struct measurement *measurement);

#endif
