/* rabbitmq-c, one job in a process of its own: JOB URL QUEUE SIZE COUNT LIMIT_MS. Tells what it took in a line of JSON. */

#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* As in src/cases.rs. */
enum { PREFETCH = 500, WINDOW = 1000, WINDOW_LOW = 750, POOL = 4, SHARERS = 8, IN_FLIGHT = 32, PATIENCE = 20 };

static const char *job, *url, *queue_name;
static size_t size, count;
static double limit;
static char *body;

static void fail(const char *what) {
    fprintf(stderr, "rabbitmq-c: %s: %s\n", job, what);
    exit(1);
}

static void check(bool good, const char *what) {
    if (!good) fail(what);
}

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double wall(void) { return seconds(CLOCK_MONOTONIC); }

/* The measured time. */
static double began, cpu_began;

static void start(void) {
    cpu_began = seconds(CLOCK_PROCESS_CPUTIME_ID);
    began = wall();
}

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double percentile(const double *sorted, size_t number, size_t percent) {
    size_t rank = (number * percent + 99) / 100;
    return sorted[rank ? rank - 1 : 0] * 1e6;
}

static void stop(size_t messages, double *latencies, size_t number) {
    double took = wall() - began, cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu_began;
    long peak = 0;
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status)) sscanf(line, "VmHWM: %ld", &peak);
    if (status) fclose(status);
    check(peak > 0, "no VmHWM");
    printf("{\"messages\":%zu,\"seconds\":%.9f,\"cpu_us\":%.3f,\"peak_kib\":%ld", messages, took, cpu * 1e6, peak);
    if (number) {
        qsort(latencies, number, sizeof *latencies, ascending);
        printf(",\"p50_us\":%.3f,\"p99_us\":%.3f}\n", percentile(latencies, number, 50),
               percentile(latencies, number, 99));
    } else {
        printf(",\"p50_us\":null,\"p99_us\":null}\n");
    }
}

static double *room(size_t number) {
    double *latencies = malloc((number + 1) * sizeof *latencies);
    check(latencies, "no memory");
    return latencies;
}

static void replied(amqp_rpc_reply_t reply, const char *what) {
    if (reply.reply_type == AMQP_RESPONSE_LIBRARY_EXCEPTION)
        fprintf(stderr, "rabbitmq-c: %s\n", amqp_error_string2(reply.library_error));
    check(reply.reply_type == AMQP_RESPONSE_NORMAL, what);
}

static amqp_connection_state_t open_channel(bool confirms) {
    struct amqp_connection_info info;
    char *copy = strdup(url);
    check(copy && amqp_parse_url(copy, &info) == AMQP_STATUS_OK, "the URL");
    amqp_connection_state_t state = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(state);
    check(socket && amqp_socket_open(socket, info.host, info.port) == AMQP_STATUS_OK, "connect");
    replied(amqp_login(state, info.vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, info.user, info.password), "login");
    amqp_channel_open(state, 1);
    replied(amqp_get_rpc_reply(state), "open a channel");
    if (confirms) {
        amqp_confirm_select(state, 1);
        replied(amqp_get_rpc_reply(state), "confirm.select");
    }
    free(copy);
    return state;
}

/* A round trip, after which the broker has had everything before it. */
static void close_channel(amqp_connection_state_t state) {
    replied(amqp_channel_close(state, 1, AMQP_REPLY_SUCCESS), "close the channel");
}

static void publish(amqp_connection_state_t state, const amqp_basic_properties_t *properties) {
    amqp_bytes_t bytes = {.len = size, .bytes = body};
    int status = amqp_basic_publish(state, 1, amqp_empty_bytes, amqp_cstring_bytes(queue_name), true, false, properties,
                                    bytes);
    check(status == AMQP_STATUS_OK, "publish");
}

static void publish_persistent(amqp_connection_state_t state) {
    amqp_basic_properties_t properties = {._flags = AMQP_BASIC_DELIVERY_MODE_FLAG, .delivery_mode = 2};
    publish(state, &properties);
}

/* The next confirm; anything else is a failure, a returned message too. */
static amqp_basic_ack_t confirm(amqp_connection_state_t state) {
    amqp_frame_t frame;
    struct timeval patience = {.tv_sec = PATIENCE};
    amqp_maybe_release_buffers(state);
    check(amqp_simple_wait_frame_noblock(state, &frame, &patience) == AMQP_STATUS_OK, "no confirm");
    check(frame.frame_type == AMQP_FRAME_METHOD && frame.payload.method.id == AMQP_BASIC_ACK_METHOD, "not an ack");
    return *(amqp_basic_ack_t *)frame.payload.method.decoded;
}

static void publish_pipelined(void) {
    amqp_connection_state_t state = open_channel(true);
    /* What is confirmed by its tag; everything up to `low` is. */
    bool *confirmed = calloc(count + 2, sizeof *confirmed);
    check(confirmed, "no memory");
    size_t sent = 0, open = 0, low = 0;
    start();
    while (sent < count || open > 0) {
        if (sent < count && open < WINDOW) {
            publish_persistent(state);
            sent++, open++;
            continue;
        }
        size_t until = sent < count ? WINDOW_LOW : 0;
        while (open > until) {
            amqp_basic_ack_t ack = confirm(state);
            check(ack.delivery_tag > low && ack.delivery_tag <= sent, "an ack of what was not sent");
            for (size_t tag = ack.multiple ? low + 1 : ack.delivery_tag; tag <= ack.delivery_tag; tag++) {
                open -= !confirmed[tag];
                confirmed[tag] = true;
            }
            while (low < sent && confirmed[low + 1]) low++;
        }
    }
    stop(count, NULL, 0);
}

static void publish_sync(void) {
    amqp_connection_state_t state = open_channel(true);
    double *latencies = room(count);
    size_t done = 0;
    start();
    for (double now = began; done < count && now - began < limit; done++) {
        publish_persistent(state);
        confirm(state);
        double then = now;
        now = wall();
        latencies[done] = now - then;
    }
    stop(done, latencies, done);
}

static struct {
    pthread_mutex_t lock;
    pthread_cond_t back;
    amqp_connection_state_t idle[POOL];
    size_t number;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .back = PTHREAD_COND_INITIALIZER};

struct sharer {
    pthread_t thread;
    double *latencies;
    size_t done;
};

static void *share(void *argument) {
    struct sharer *sharer = argument;
    for (double now = wall(); sharer->done < count / SHARERS && now - began < limit; sharer->done++) {
        pthread_mutex_lock(&pool.lock);
        while (!pool.number) pthread_cond_wait(&pool.back, &pool.lock);
        amqp_connection_state_t state = pool.idle[--pool.number];
        pthread_mutex_unlock(&pool.lock);
        publish_persistent(state);
        confirm(state);
        pthread_mutex_lock(&pool.lock);
        pool.idle[pool.number++] = state;
        pthread_cond_signal(&pool.back);
        pthread_mutex_unlock(&pool.lock);
        double then = now;
        now = wall();
        sharer->latencies[sharer->done] = now - then;
    }
    return NULL;
}

static void publish_pool(void) {
    for (; pool.number < POOL; pool.number++) pool.idle[pool.number] = open_channel(true);
    struct sharer sharers[SHARERS] = {0};
    double *all = room(count);
    size_t done = 0;
    start();
    for (size_t i = 0; i < SHARERS; i++) {
        sharers[i].latencies = room(count / SHARERS);
        check(!pthread_create(&sharers[i].thread, NULL, share, &sharers[i]), "no thread");
    }
    for (size_t i = 0; i < SHARERS; i++) {
        pthread_join(sharers[i].thread, NULL);
        memcpy(all + done, sharers[i].latencies, sharers[i].done * sizeof *all);
        done += sharers[i].done;
    }
    stop(done, all, done);
}

static amqp_envelope_t delivered(amqp_connection_state_t state) {
    amqp_envelope_t envelope;
    struct timeval patience = {.tv_sec = PATIENCE};
    amqp_maybe_release_buffers(state);
    replied(amqp_consume_message(state, &envelope, &patience, 0), "consume");
    return envelope;
}

static void consume(void) {
    amqp_connection_state_t state = open_channel(false);
    amqp_basic_qos(state, 1, 0, PREFETCH, false);
    replied(amqp_get_rpc_reply(state), "qos");
    start();
    amqp_basic_consume(state, 1, amqp_cstring_bytes(queue_name), amqp_empty_bytes, false, false, false, amqp_empty_table);
    replied(amqp_get_rpc_reply(state), "basic.consume");
    for (size_t i = 0; i < count; i++) {
        amqp_envelope_t envelope = delivered(state);
        check(envelope.message.body.len == size, "not what was published");
        check(amqp_basic_ack(state, 1, envelope.delivery_tag, false) == AMQP_STATUS_OK, "ack");
        amqp_destroy_envelope(&envelope);
    }
    close_channel(state);
    stop(count, NULL, 0);
}

static void get(void) {
    amqp_connection_state_t state = open_channel(false);
    double *latencies = room(count);
    size_t done = 0;
    start();
    for (double now = began; done < count && now - began < limit; done++) {
        amqp_maybe_release_buffers(state);
        amqp_rpc_reply_t reply = amqp_basic_get(state, 1, amqp_cstring_bytes(queue_name), false);
        replied(reply, "get");
        check(reply.reply.id == AMQP_BASIC_GET_OK_METHOD, "the queue is empty");
        uint64_t tag = ((amqp_basic_get_ok_t *)reply.reply.decoded)->delivery_tag;
        amqp_message_t message;
        replied(amqp_read_message(state, 1, &message, 0), "read a message");
        check(message.body.len == size, "not what was published");
        amqp_destroy_message(&message);
        check(amqp_basic_ack(state, 1, tag, false) == AMQP_STATUS_OK, "ack");
        double then = now;
        now = wall();
        latencies[done] = now - then;
    }
    stop(done, latencies, done);
    close_channel(state);
}

/* Calls in flight: those whose numbers, which are their correlation ids, are set. */
static bool *asked;

static void answer(amqp_connection_state_t state, size_t sent) {
    amqp_envelope_t envelope = delivered(state);
    amqp_bytes_t id = envelope.message.properties.correlation_id;
    char text[24] = "";
    memcpy(text, id.bytes, id.len < sizeof text ? id.len : sizeof text - 1);
    size_t number = strtoul(text, NULL, 10);
    check(number >= 1 && number <= sent && asked[number], "an answer to what was not asked");
    asked[number] = false;
    check(envelope.message.body.len && *(char *)envelope.message.body.bytes == '{', "an answer that is none");
    amqp_destroy_envelope(&envelope);
}

static void rpc(size_t in_flight) {
    memcpy(body, "{\"data\":\"", 9);
    memcpy(body + size - 2, "\"}", 2);
    amqp_connection_state_t state = open_channel(false);
    amqp_bytes_t reply_to = amqp_cstring_bytes("amq.rabbitmq.reply-to");
    amqp_basic_consume(state, 1, reply_to, amqp_empty_bytes, false, true, false, amqp_empty_table);
    replied(amqp_get_rpc_reply(state), "basic.consume");
    double *latencies = room(count);
    asked = calloc(count + 1, sizeof *asked);
    check(asked, "no memory");
    size_t sent = 0, open = 0, timed = 0;
    start();
    for (double now = began; sent < count && now - began < limit;) {
        char id[24];
        snprintf(id, sizeof id, "%zu", ++sent);
        asked[sent] = true;
        amqp_basic_properties_t properties = {
            ._flags = AMQP_BASIC_CORRELATION_ID_FLAG | AMQP_BASIC_REPLY_TO_FLAG | AMQP_BASIC_EXPIRATION_FLAG |
                      AMQP_BASIC_DELIVERY_MODE_FLAG,
            .correlation_id = amqp_cstring_bytes(id),
            .reply_to = reply_to,
            .expiration = amqp_cstring_bytes("30000"),
            .delivery_mode = 1,
        };
        publish(state, &properties);
        if (++open == in_flight) answer(state, sent), open--;
        double then = now;
        now = wall();
        if (in_flight == 1) latencies[timed++] = now - then;
    }
    for (; open; open--) answer(state, sent);
    stop(sent, latencies, timed);
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: peer-rabbitmq-c JOB URL QUEUE SIZE COUNT LIMIT_MS\n");
        return 2;
    }
    job = argv[1], url = argv[2], queue_name = argv[3];
    size = strtoul(argv[4], NULL, 10), count = strtoul(argv[5], NULL, 10), limit = strtod(argv[6], NULL) / 1e3;
    body = malloc(size + 16);
    check(body, "no memory");
    memset(body, 'x', size);
    if (!strcmp(job, "publish-async")) publish_pipelined();
    else if (!strcmp(job, "publish-sync")) publish_sync();
    else if (!strcmp(job, "publish-pool")) publish_pool();
    else if (!strcmp(job, "consume")) consume();
    else if (!strcmp(job, "get")) get();
    else if (!strcmp(job, "rpc-sequential")) rpc(1);
    else if (!strcmp(job, "rpc-async")) rpc(IN_FLIGHT);
    else fail("no such job");
    return 0;
}
