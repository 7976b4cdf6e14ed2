/* Open-loop HTTP/1.1 load generator: Poisson arrivals, latency counted from the moment a request was meant to be sent.
 *
 *   open_loop PORT REQUEST_FILE RATE_PER_S SECONDS CONNECTIONS MOST_CONNECTIONS TARGET_S SEED [LATENCIES_FILE]
 *
 * REQUEST_FILE holds one whole request as it goes over the wire. Arrivals do not wait for answers. It starts with
 * CONNECTIONS keep-alive connections that take turns. An arrival that finds all of them busy opens another, up to
 * MOST_CONNECTIONS; beyond those it waits inside the client and that wait counts in its latency. With enough of them the
 * client holds nothing back, and an overloaded server sees the overload. Anything answered with a status other than 200,
 * or not answered 1 s after the end, is not in time. Prints one JSON object. LATENCIES_FILE receives, for each request that
 * was answered with 200, two doubles: when it was meant to be sent, in seconds of CLOCK_MONOTONIC, and its latency in
 * seconds. In C so that the client takes little of the CPU it shares with the server. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUFFER 16384 /* bytes of one answer held, headers included */

typedef struct {
    int fd, busy, want_write; /* fd is -1 while closed */
    size_t sent, len;         /* bytes of the request sent; of the answer held */
    double intended_s;
    char buf[BUFFER];
} conn;

typedef struct {
    double intended_s, latency_s;
} answer;

static char *request;
static size_t request_len;
static int port, ep;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what) {
    perror(what);
    exit(2);
}

/* Start to connect; epoll says when it is done. */
static void open_conn(conn *c) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (void *)&a, sizeof a) && errno != EINPROGRESS) die("connect");
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e);
    c->busy = c->want_write = 0;
    c->len = 0;
}

static void close_conn(conn *c) {
    close(c->fd);
    c->fd = -1;
}

static void want_write(conn *c, int on) {
    if (c->want_write == on) return;
    c->want_write = on;
    struct epoll_event e = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
}

/* Send what the socket takes: 0 when that went well, -1 when the connection is broken. */
static int push(conn *c) {
    while (c->sent < request_len) {
        ssize_t n = send(c->fd, request + c->sent, request_len - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) {
                want_write(c, 1);
                return 0;
            }
            return -1;
        }
        c->sent += n;
    }
    want_write(c, 0);
    return 0;
}

/* Status once a whole answer is in the buffer, 0 while it is not, -1 if it cannot be read. */
static int response(conn *c) {
    c->buf[c->len] = 0;
    char *end = strstr(c->buf, "\r\n\r\n");
    if (!end) return c->len < BUFFER - 1 ? 0 : -1;
    char *cl = strcasestr(c->buf, "content-length:"), *te = strcasestr(c->buf, "transfer-encoding: chunked");
    size_t head = end + 4 - c->buf;
    if (cl && cl < end) {
        if (c->len < head + strtoul(cl + 15, 0, 10)) return 0;
    } else if (te && te < end) {
        if (c->len < head + 5 || memcmp(c->buf + c->len - 5, "0\r\n\r\n", 5)) return 0;
    } else
        return -1;
    return atoi(c->buf + 9);
}

static int by_latency(const void *a, const void *b) {
    double x = ((const answer *)a)->latency_s, y = ((const answer *)b)->latency_s;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 9 && argc != 10) {
        fprintf(stderr, "usage: open_loop PORT REQUEST_FILE RATE_PER_S SECONDS CONNECTIONS MOST_CONNECTIONS TARGET_S SEED [LATENCIES_FILE]\n");
        return 2;
    }
    port = atoi(argv[1]);
    double rate = atof(argv[3]), seconds = atof(argv[4]), target_s = atof(argv[7]);
    int n_conns = atoi(argv[5]), most = atoi(argv[6]);
    srand48(atoi(argv[8]));
    FILE *f = fopen(argv[2], "rb");
    if (!f) die(argv[2]);
    fseek(f, 0, SEEK_END);
    request_len = ftell(f);
    rewind(f);
    request = malloc(request_len);
    if (fread(request, 1, request_len, f) != request_len) die("read");
    fclose(f);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    ep = epoll_create1(0);
    conn *conns = calloc(most, sizeof *conns);
    conn **idle = malloc(most * sizeof *idle); /* a ring: connections take turns */
    int idle_head = 0, idle_n = 0;
    for (int i = 0; i < n_conns; i++) {
        open_conn(&conns[i]);
        idle[idle_n++] = &conns[i];
    }

    size_t cap = rate * seconds * 1.5 + 1000, head = 0, tail = 0, done = 0, refused = 0, failed = 0, in_time = 0, in_flight = 0, held = 0;
    double *queue = malloc(cap * sizeof *queue), lag_most_s = 0;
    answer *answers = malloc(cap * sizeof *answers);
    double start = now() + 0.02, stop = start + seconds, next = start;
    next += -log(1 - drand48()) / rate;
    struct epoll_event ev[256];
    for (;;) {
        double t = now();
        while (next <= t && next < stop && tail < cap) {
            if (t - next > lag_most_s) lag_most_s = t - next;
            queue[tail++] = next;
            next += -log(1 - drand48()) / rate;
        }
        while (head < tail) {
            conn *c;
            if (idle_n) {
                c = idle[idle_head];
                idle_head = (idle_head + 1) % most;
                idle_n--;
            } else if (n_conns < most) {
                c = &conns[n_conns++];
                c->fd = -1;
            } else
                break;
            if (c->fd < 0) open_conn(c);
            c->busy = 1;
            c->sent = c->len = 0;
            c->intended_s = queue[head++];
            in_flight++;
            if (push(c)) {
                failed++;
                in_flight--;
                c->busy = 0;
                close_conn(c);
                idle[(idle_head + idle_n++) % most] = c;
            }
        }
        if (tail - head > held) held = tail - head;
        if (next >= stop && head == tail && !in_flight) break;
        if (t > stop + 1.0) break;
        double wait = next < stop ? next - now() : 0.05;
        if (wait < 0) wait = 0;
        struct timespec ts = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
        int n = epoll_pwait2(ep, ev, 256, &ts, NULL);
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            int status = 0, gone = 0;
            if (ev[i].events & EPOLLOUT && push(c)) gone = 1;
            if (!gone && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                ssize_t r = read(c->fd, c->buf + c->len, BUFFER - 1 - c->len);
                if (r <= 0 && !(r < 0 && errno == EAGAIN)) gone = 1;
                else if (r > 0) {
                    c->len += r;
                    status = response(c);
                }
            }
            if (!gone && !status) continue;
            int was_busy = c->busy;
            c->busy = 0;
            if (gone || status < 0) close_conn(c);
            if (!was_busy) continue;
            in_flight--;
            idle[(idle_head + idle_n++) % most] = c;
            if (status == 200) {
                answers[done] = (answer){c->intended_s, now() - c->intended_s};
                if (answers[done++].latency_s <= target_s) in_time++;
            } else if (status == 429 || status == 503 || status == 504) refused++;
            else failed++;
        }
    }
    if (argc == 10) {
        FILE *out = fopen(argv[9], "wb");
        if (!out || fwrite(answers, sizeof *answers, done, out) != done || fclose(out)) die(argv[9]);
    }
    qsort(answers, done, sizeof *answers, by_latency);
#define P(q) (done ? answers[(size_t)((done - 1) * q)].latency_s : -1)
    printf("{\"offered_per_s\": %.2f, \"seconds\": %.3f, \"n_sent\": %zu, \"n_ok\": %zu, \"n_in_time\": %zu, \"n_refused\": %zu, "
           "\"n_failed\": %zu, \"n_unanswered\": %zu, \"p50_s\": %.7f, \"p99_s\": %.7f, \"p999_s\": %.7f, \"most_s\": %.7f, "
           "\"n_connections\": %d, \"n_held_back\": %zu, \"lag_most_s\": %.7f}\n",
           rate, seconds, tail, done, in_time, refused, failed, tail - done - refused - failed, P(0.5), P(0.99), P(0.999), P(1.0),
           n_conns, held, lag_most_s);
}
