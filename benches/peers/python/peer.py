"""pika, one job in a process of its own: JOB URL QUEUE SIZE COUNT LIMIT_MS. Tells what it took in a line of JSON."""

import json
import queue as queues
import sys
import threading
import time

import pika

# As in src/cases.rs.
PREFETCH, WINDOW, WINDOW_LOW, POOL, SHARERS, IN_FLIGHT, PATIENCE = 500, 1000, 750, 4, 8, 32, 20
DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"

JOB, URL, QUEUE = sys.argv[1:4]
SIZE, COUNT = int(sys.argv[4]), int(sys.argv[5])
LIMIT = int(sys.argv[6]) / 1000
BODY = b"x" * SIZE
PERSISTENT = pika.BasicProperties(delivery_mode=2)


class Meter:
    def __init__(self):
        self.cpu, self.begin = time.process_time(), time.perf_counter()

    def stop(self, messages, latencies=()):
        seconds, cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
        with open("/proc/self/status", encoding="ascii") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        latencies = sorted(latencies)

        def percentile(percent):
            return latencies[max(-(-len(latencies) * percent // 100), 1) - 1] * 1e6 if latencies else None

        told = {"messages": messages, "seconds": seconds, "cpu_us": cpu * 1e6, "peak_kib": peak}
        print(json.dumps({**told, "p50_us": percentile(50), "p99_us": percentile(99)}))


def paced(call, count=COUNT):
    """Calls one after another, until there have been enough or the time is up; returns what each took."""
    latencies = []
    now = time.perf_counter()
    until = now + LIMIT
    while len(latencies) < count and now < until:
        call()
        begin, now = now, time.perf_counter()
        latencies.append(now - begin)
    return latencies


def connect():
    return pika.BlockingConnection(pika.URLParameters(URL)).channel()


def publisher():
    channel = connect()
    channel.confirm_delivery()
    return channel


def publish_one(channel):
    # Raises if it is nacked or returned.
    channel.basic_publish("", QUEUE, BODY, PERSISTENT, mandatory=True)


def publish_pipelined():
    """The blocking adapter waits for each confirm, so this is the asynchronous one."""
    sent, settled, low = 0, set(), 0
    meter, done, failed = None, False, None

    def fill():
        nonlocal sent
        while sent < COUNT and sent - low - len(settled) < WINDOW:
            channel.basic_publish("", QUEUE, BODY, PERSISTENT, mandatory=True)
            sent += 1

    def on_confirm(frame):
        nonlocal low, done
        if not isinstance(frame.method, pika.spec.Basic.Ack):
            return fail("a nack")
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            low = max(low, tag)
            settled.difference_update([one for one in settled if one <= low])
        else:
            settled.add(tag)
        while low + 1 in settled:
            low += 1
            settled.remove(low)
        if low == COUNT:
            meter.stop(COUNT)
            done = True
            connection.close()
        elif sent - low - len(settled) <= WINDOW_LOW:
            fill()

    def fail(problem):
        nonlocal failed
        failed = problem
        connection.close()

    def on_open_channel(opened):
        nonlocal channel
        channel = opened
        channel.add_on_return_callback(lambda *_: fail("a returned message"))
        channel.confirm_delivery(on_confirm, callback=begin)

    def begin(_):
        nonlocal meter
        meter = Meter()
        fill()

    channel = None
    connection = pika.SelectConnection(
        pika.URLParameters(URL),
        on_open_callback=lambda opened: opened.channel(on_open_callback=on_open_channel),
        on_open_error_callback=lambda opened, error: opened.ioloop.stop(),
        on_close_callback=lambda closed, reason: closed.ioloop.stop(),
    )
    connection.ioloop.start()
    if not done:
        sys.exit(f"pika: {failed or 'the connection was lost'}")


def publish_sync():
    channel = publisher()
    meter = Meter()
    latencies = paced(lambda: publish_one(channel))
    meter.stop(len(latencies), latencies)


def publish_pool():
    pool, all_latencies, failures = queues.Queue(), [], []
    for _ in range(POOL):
        pool.put(publisher())

    def publish():
        channel = pool.get(timeout=PATIENCE)
        publish_one(channel)
        pool.put(channel)

    def share():
        try:
            all_latencies.append(paced(publish, COUNT // SHARERS))
        except BaseException as failure:
            failures.append(failure)

    sharers = [threading.Thread(target=share) for _ in range(SHARERS)]
    meter = Meter()
    for sharer in sharers:
        sharer.start()
    for sharer in sharers:
        sharer.join()
    if failures:
        sys.exit(f"pika: {failures[0]!r}")
    latencies = [latency for some in all_latencies for latency in some]
    meter.stop(len(latencies), latencies)


def consume():
    channel = connect()
    channel.basic_qos(prefetch_count=PREFETCH)
    left = COUNT

    def on_message(channel, method, _, body):
        nonlocal left
        if len(body) != SIZE:
            sys.exit("pika: not what was published")
        channel.basic_ack(method.delivery_tag)
        left -= 1
        if not left:
            channel.stop_consuming()

    meter = Meter()
    channel.basic_consume(QUEUE, on_message)
    channel.start_consuming()
    channel.close()
    meter.stop(COUNT)


def get():
    channel = connect()

    def call():
        method, _, body = channel.basic_get(QUEUE)
        if method is None or len(body) != SIZE:
            sys.exit("pika: the queue is empty")
        channel.basic_ack(method.delivery_tag)

    meter = Meter()
    latencies = paced(call)
    meter.stop(len(latencies), latencies)
    channel.close()


def rpc(in_flight):
    channel = connect()
    head, tail = b'{"data":"', b'"}'
    body = head + b"x" * (SIZE - len(head) - len(tail)) + tail
    calls, sent = set(), 0

    def on_answer(_, __, properties, answer):
        calls.remove(properties.correlation_id)
        if not answer.startswith(b"{"):
            sys.exit("pika: an answer that is none")

    def wait(at_most):
        deadline = time.monotonic() + PATIENCE
        while len(calls) > at_most:
            if time.monotonic() > deadline:
                sys.exit("pika: no answer")
            channel.connection.process_data_events(time_limit=PATIENCE)

    def call():
        nonlocal sent
        sent += 1
        calls.add(str(sent))
        properties = pika.BasicProperties(
            correlation_id=str(sent), reply_to=DIRECT_REPLY_TO, expiration="30000", delivery_mode=1
        )
        channel.basic_publish("", QUEUE, body, properties, mandatory=True)
        if len(calls) == in_flight:
            wait(in_flight - 1)

    channel.basic_consume(DIRECT_REPLY_TO, on_answer, auto_ack=True)
    meter = Meter()
    latencies = paced(call)
    wait(0)
    meter.stop(sent, latencies if in_flight == 1 else ())


JOBS = {
    "publish-async": publish_pipelined,
    "publish-sync": publish_sync,
    "publish-pool": publish_pool,
    "consume": consume,
    "get": get,
    "rpc-sequential": lambda: rpc(1),
    "rpc-async": lambda: rpc(IN_FLIGHT),
}
JOBS[JOB]()
