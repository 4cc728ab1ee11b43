"""What the suites share: connections that end with their test, names of its own, and refusals with their texts.

The suites run unmodified against any broker: AMQP_URL says which. They expect what RabbitMQ 3.10 does, or 4.0, whichever the
broker says it is: see `by_release`.
"""

import os
import time
import unittest
import uuid

import pika
import pika.data
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker

URL = os.environ["AMQP_URL"]

# No answer of a broker takes this long, in seconds.
PATIENCE = 20


def major():
    """The first number of the version that the broker calls itself."""
    connection = pika.BlockingConnection(pika.URLParameters(URL))
    version = connection._impl.server_properties["version"]
    connection.close()
    return int(version.split(".")[0])


MAJOR = major()


def by_release(v3_10, v4_0):
    """What RabbitMQ 3.10 answers, or what 4.0 answers instead."""
    return v4_0 if MAJOR >= 4 else v3_10


class Field(bytes):
    """A value of a table as it is to stand on the wire, tag included: pika writes only a few of the types."""


def encode_value(pieces, value, plain=pika.data.encode_value):
    if isinstance(value, Field):
        pieces.append(bytes(value))
        return len(value)
    return plain(pieces, value)


def decode_properties(self, encoded, offset=0, plain=pika.BasicProperties.decode):
    self.raw = bytes(encoded[offset:])
    return plain(self, encoded, offset)


pika.data.encode_value = encode_value
# Properties remember the bytes they were read from.
pika.BasicProperties.decode = decode_properties


class Got:
    """A message that was delivered."""

    def __init__(self, channel, method, properties, body):
        self.channel, self.method, self.properties, self.body = channel, method, properties, body
        self.tag = method.delivery_tag
        self.redelivered = method.redelivered

    @property
    def headers(self):
        return self.properties.headers


class Case(unittest.TestCase):
    """A test with a connection, a channel, and a name that no other test has."""

    maxDiff = None

    def setUp(self):
        self.name = f"interop.{uuid.uuid4().hex[:8]}"
        self.connection, self.channel = self.connect()

    def connect(self, **settings):
        parameters = pika.URLParameters(URL)
        for name, value in settings.items():
            setattr(parameters, name, value)
        connection = pika.BlockingConnection(parameters)
        self.addCleanup(lambda: connection.is_open and connection.close())
        return connection, connection.channel()

    def named(self, what):
        return f"{self.name}.{what}"

    def queue(self, what="q", channel=None, **settings):
        """Declares a queue that is gone after the test; returns its name."""
        settings.setdefault("exclusive", True)
        name = self.named(what)
        (channel or self.channel).queue_declare(name, **settings)
        if not settings["exclusive"]:
            self.addCleanup(self.delete, lambda channel: channel.queue_delete(name))
        return name

    def exchange(self, what="x", kind="direct", **settings):
        """Declares an exchange that is gone after the test; returns its name."""
        name = self.named(what)
        self.channel.exchange_declare(name, kind, **settings)
        self.addCleanup(self.delete, lambda channel: channel.exchange_delete(name))
        return name

    @staticmethod
    def delete(action):
        connection = pika.BlockingConnection(pika.URLParameters(URL))
        action(connection.channel())
        connection.close()

    def publish(self, queue, *bodies, exchange="", **properties):
        for body in bodies:
            self.channel.basic_publish(exchange, queue, body, pika.BasicProperties(**properties))

    def get(self, queue, channel=None, auto_ack=True):
        """The next message, or None."""
        channel = channel or self.channel
        method, properties, body = channel.basic_get(queue, auto_ack)
        return method and Got(channel, method, properties, body)

    def bodies(self, queue):
        """Empties a queue."""
        return [got.body for got in iter(lambda: self.get(queue), None)]

    def consume(self, queue, channel=None, **settings):
        """The list that fills with what the consumer gets, and its tag."""
        got = []
        channel = channel or self.channel
        tag = channel.basic_consume(queue, lambda *delivery: got.append(Got(*delivery)), **settings)
        return got, tag

    def until(self, what, condition):
        """Serves the test's connections until the condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), deadline, f"never: {what}")
            self.connection.process_data_events(0.01)

    def take(self, got, count):
        """Waits for that many deliveries, takes them out of the list, and returns them."""
        self.until(f"{count} deliveries, not {len(got)}", lambda: len(got) >= count)
        taken, got[:] = got[:count], got[count:]
        return taken

    def until_waiting(self, count, queue):
        """Until so many messages wait in a queue. Those that were just published may still be on their way to it."""
        declare = self.channel.queue_declare
        self.until(f"{count} messages wait", lambda: declare(queue, passive=True).method.message_count == count)

    def settle(self, queue):
        """Gives the queue an occasion to deliver what it should not: it answers, and what has come is here."""
        self.channel.queue_declare(queue, passive=True)
        self.connection.process_data_events(0.01)

    def refused(self, code, text, action):
        """The action, on a channel of its own, has that closed."""
        channel = self.connection.channel()
        with self.assertRaises(ChannelClosedByBroker) as caught:
            action(channel)
            # For what has no answer.
            channel.queue_declare("amq.rabbitmq.reply-to", passive=True)
        self.assertEqual((caught.exception.reply_code, caught.exception.reply_text), (code, text))

    def refused_connection(self, code, text, action, **settings):
        """The action, on a connection of its own, has that closed."""
        with self.assertRaises(ConnectionClosedByBroker) as caught:
            connection, channel = self.connect(**settings)
            action(channel)
            self.until("the connection is closed", lambda: connection.process_data_events(0.01))
        self.assertEqual((caught.exception.reply_code, caught.exception.reply_text), (code, text))


def say(channel, method):
    """Sends a method as it is, past pika's own checks."""
    channel._impl._send_method(method)


def send(channel, frame_bytes):
    """Sends bytes as they are."""
    channel.connection._impl._output_marshaled_frames([frame_bytes])
