#define _GNU_SOURCE
#include "measure.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* The warm-up, for caches, branch predictors and the server's free lists: a part of the window. */
static const double WARM_UP_PART = 0.3, LONGEST_WARM_UP = 0.3; /* seconds */

/* On a crowded machine a server may not get its core at all for as long as a short window takes:
 * the window then stays open for the first answer, this long at most. */
static const int64_t PATIENCE = INT64_C(10) * SECOND;

_Noreturn void broken(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(EXIT_BROKEN);
}

long argument(const char *name, const char *text, long least, long most)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < least || value > most) {
        fprintf(stderr, "%s=%s: expected a whole number, %ld to %ld\n", name, text, least, most);
        exit(EXIT_USAGE);
    }
    return value;
}

double duration(const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= 0.01 && value <= 600)) {
        fprintf(stderr, "SECONDS=%s: expected a number, 0.01 to 600\n", text);
        exit(EXIT_USAGE);
    }
    return value;
}

void expect_arguments(int given, int wanted, const char *usage)
{
    if (given == wanted)
        return;
    fprintf(stderr, "usage: %s\n", usage);
    exit(EXIT_USAGE);
}

void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit); /* when refused, socket(2) will say so by name */
    }
}

struct sockaddr_in loopback(int host, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl((INADDR_LOOPBACK & 0xffffff00u) + host);
    return address;
}

void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (memory == NULL)
        broken("out of memory");
    return memory;
}

char *lines(size_t size, size_t line_size)
{
    char *text = allocate(size, 1);
    for (size_t i = 0; i < size; i++)
        text[i] = (i + 1) % line_size ? 'a' + i % 26 : '\n';
    text[size - 1] = '\n';
    return text;
}

int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * SECOND + time.tv_nsec;
}

/* Nanoseconds of processor time of a process: all its threads, those that have ended included.
 *
 * /proc/PID/stat has the same sum in ticks of 10 ms, and /proc/PID/task/TID/schedstat has
 * nanoseconds, but forgets a thread when it ends; a server with a thread for each connection
 * would look cheap.  The process's own clock is exact and forgets nobody.
 */
static int64_t processor_time(pid_t process)
{
    clockid_t clock;
    struct timespec time;
    if (clock_getcpuclockid(process, &clock) != 0 || clock_gettime(clock, &time) != 0)
        broken("the server, process %d, is gone", (int)process);
    return (int64_t)time.tv_sec * SECOND + time.tv_nsec;
}

/* Buckets: the first 64 hold one nanosecond each; then every power of two has 64 of its own. */
static int bucket_of(int64_t latency)
{
    if (latency < LATENCY_STEPS)
        return latency < 0 ? 0 : (int)latency;
    int shift = 63 - __builtin_clzll(latency) - 6;
    return (shift + 1) * LATENCY_STEPS + (int)((latency >> shift) - LATENCY_STEPS);
}

static double middle_of(int bucket)
{
    if (bucket < LATENCY_STEPS)
        return bucket;
    int shift = bucket / LATENCY_STEPS - 1;
    double steps = bucket % LATENCY_STEPS + LATENCY_STEPS + 0.5;
    return steps * (double)(INT64_C(1) << shift);
}

static double quantile(const struct measurement *measurement, double part)
{
    int64_t wanted = (int64_t)(measurement->messages * part), seen = 0;
    for (int bucket = 0; bucket < LATENCY_BUCKETS; bucket++) {
        seen += measurement->latencies[bucket];
        if (seen > wanted)
            return middle_of(bucket);
    }
    return 0;
}

void measurement_begin(struct measurement *measurement, double seconds, pid_t server)
{
    double warm_up = fmin(seconds * WARM_UP_PART, LONGEST_WARM_UP);
    *measurement = (struct measurement){.server = server};
    measurement->opens = now() + (int64_t)(warm_up * SECOND);
    measurement->closes = measurement->opens + (int64_t)(seconds * SECOND);
}

bool measurement_goes_on(struct measurement *measurement)
{
    int64_t instant = now();
    if (!measurement->open && instant >= measurement->opens) {
        int64_t length = measurement->closes - measurement->opens;
        measurement->open = true;
        measurement->failures = 0;
        measurement->processor = processor_time(measurement->server);
        measurement->opens = now();
        measurement->closes = measurement->opens + length;
    } else if (measurement->open && instant >= measurement->closes &&
               (measurement->messages > 0 || instant >= measurement->closes + PATIENCE)) {
        measurement->processor = processor_time(measurement->server) - measurement->processor;
        measurement->closes = instant;
        return false;
    }
    return true;
}

int64_t measurement_count(struct measurement *measurement, int64_t since)
{
    int64_t instant = now();
    if (measurement->open) {
        measurement->messages++;
        measurement->latencies[bucket_of(instant - since)]++;
    }
    return instant;
}

void measurement_report(const struct measurement *measurement)
{
    printf("{\"messages\": %" PRId64 ", \"failures\": %" PRId64 ", \"seconds\": %.6f, "
           "\"processor_seconds\": %.9f, \"p50\": %.9f, \"p99\": %.9f, \"p999\": %.9f}\n",
           measurement->messages, measurement->failures,
           (double)(measurement->closes - measurement->opens) / SECOND,
           (double)measurement->processor / SECOND, quantile(measurement, 0.5) / SECOND,
           quantile(measurement, 0.99) / SECOND, quantile(measurement, 0.999) / SECOND);
}
