"""Messages that die in a queue, and what they carry on to where they go then, by the client pika."""

import datetime
import struct
import unittest

import pika
from pika.exceptions import NackError

from support import Case, Field, by_release


class DeadLettering(Case):
    def deaths(self, got):
        """The headers of a dead letter with the times in its x-death checked and taken out."""
        headers = dict(got.headers)
        for death in headers["x-death"]:
            age = datetime.datetime.now(datetime.timezone.utc) - death.pop("time")
            self.assertLess(abs(age.total_seconds()), 60)
        return headers

    def dead_letters(self, reason, queue, **more):
        """What the headers must be."""
        death = {"count": 1, "reason": reason, "queue": queue, "exchange": "", "routing-keys": [queue], **more}
        return {
            "x-death": [death],
            "x-first-death-exchange": "",
            "x-first-death-queue": queue,
            "x-first-death-reason": reason,
            **self.last_death(reason, queue),
        }

    @staticmethod
    def last_death(reason, queue):
        """What RabbitMQ 4 says of the last death as well."""
        last = {"x-last-death-exchange": "", "x-last-death-queue": queue, "x-last-death-reason": reason}
        return by_release({}, last)

    def with_dlx(self, **arguments):
        dead = self.queue("dead")
        exchange = self.exchange("dlx", "fanout")
        self.channel.queue_bind(dead, exchange)
        return self.queue(arguments={"x-dead-letter-exchange": exchange, **arguments}), dead, exchange

    def await_dead(self, dead):
        """The next dead letter: they come when they are due."""
        found = []
        self.until("a dead letter", lambda: found.append(self.get(dead)) or found[-1])
        return found[-1]

    def test_rejected(self):
        name, dead, exchange = self.with_dlx()
        self.publish(name, b"1", headers={"mine": 1}, expiration="60000")
        self.channel.basic_reject(self.get(name, auto_ack=False).tag, requeue=False)
        got = self.await_dead(dead)
        self.assertEqual((got.method.exchange, got.method.routing_key, got.body), (exchange, name, b"1"))
        self.assertIsNone(got.properties.expiration)
        expected = {"mine": 1, **self.dead_letters("rejected", name, **{"original-expiration": "60000"})}
        self.assertEqual(self.deaths(got), expected)

    def test_expired_in_a_queue_with_a_ttl(self):
        name, dead, _ = self.with_dlx(**{"x-message-ttl": 10})
        self.publish(name, b"1")
        self.assertEqual(self.deaths(self.await_dead(dead)), self.dead_letters("expired", name))

    def test_expired_of_its_own(self):
        name, dead, _ = self.with_dlx()
        self.publish(name, b"1", expiration="0")
        got = self.await_dead(dead)
        expected = self.dead_letters("expired", name, **{"original-expiration": "0"})
        self.assertEqual(self.deaths(got), expected)
        self.assertIsNone(got.properties.expiration)

    def test_only_the_head_of_a_queue_expires(self):
        name, dead, _ = self.with_dlx()
        self.publish(name, b"stays")
        self.publish(name, b"behind", expiration="1")
        self.publish(name, b"last")
        self.assertEqual(self.get(name).body, b"stays")
        self.assertEqual(self.await_dead(dead).body, b"behind")
        self.assertEqual(self.bodies(name), [b"last"])

    def test_dropped_from_a_full_queue(self):
        name, dead, _ = self.with_dlx(**{"x-max-length": 1})
        self.publish(name, b"1", b"2")
        got = self.await_dead(dead)
        self.assertEqual(got.body, b"1")
        self.assertEqual(self.deaths(got), self.dead_letters("maxlen", name))

    def test_rejected_by_a_full_queue(self):
        name, dead, _ = self.with_dlx(**{"x-max-length": 1, "x-overflow": "reject-publish-dlx"})
        self.channel.confirm_delivery()
        self.publish(name, b"1")
        with self.assertRaises(NackError):
            self.publish(name, b"2")
        got = self.await_dead(dead)
        self.assertEqual(got.body, b"2")
        self.assertEqual(self.deaths(got), self.dead_letters("maxlen", name))

    def test_deaths_are_counted_and_the_last_comes_first(self):
        retry, work = self.named("retry"), self.named("work")
        back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": work, "x-message-ttl": 1}
        self.queue("retry", arguments=back)
        self.queue("work", arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": retry})
        self.publish(work, b"1")
        for _ in range(3):
            self.channel.basic_nack(self.fetch(work).tag, requeue=False)
        deaths = self.deaths(self.fetch(work))
        common = {"count": 3, "exchange": ""}
        self.assertEqual(
            deaths,
            {
                "x-death": [
                    {**common, "reason": "expired", "queue": retry, "routing-keys": [retry]},
                    {**common, "reason": "rejected", "queue": work, "routing-keys": [work]},
                ],
                "x-first-death-exchange": "",
                "x-first-death-queue": work,
                "x-first-death-reason": "rejected",
                **self.last_death("expired", retry),
            },
        )

    def fetch(self, queue):
        found = []
        self.until("a message", lambda: found.append(self.get(queue, auto_ack=False)) or found[-1])
        return found[-1]

    def test_cycles_without_a_rejection_end(self):
        name = self.named("q")
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name, "x-message-ttl": 1}
        self.queue(arguments=arguments)
        self.publish(name, b"1")
        self.until_waiting(0, name)

    def test_byte_by_byte(self):
        name, dead, exchange = self.with_dlx()
        headers = {"u8": Field(b"B\x07"), "I64": Field(b"L" + bytes(8)), "bytes": Field(b"x\x00\x00\x00\x01\xff")}
        self.publish(name, b"1", headers=headers, priority=3)
        self.channel.basic_reject(self.get(name, auto_ack=False).tag, requeue=False)
        got = self.await_dead(dead)

        def text(value):
            value = value.encode()
            return b"S" + struct.pack(">I", len(value)) + value

        def field(key, value):
            return bytes([len(key)]) + key.encode() + value

        at = int(got.headers["x-death"][0]["time"].timestamp())
        death = b"".join([
            field("count", b"l" + struct.pack(">q", 1)),
            field("reason", text("rejected")),
            field("queue", text(name)),
            field("time", b"T" + struct.pack(">Q", at)),
            field("exchange", text("")),
            field("routing-keys", b"A" + struct.pack(">I", len(text(name))) + text(name)),
        ])
        death = b"F" + struct.pack(">I", len(death)) + death
        # In the order of their names.
        table = b"".join([
            field("I64", b"l" + bytes(8)),
            field("bytes", b"x\x00\x00\x00\x01\xff"),
            field("u8", b"B\x07"),
            field("x-death", b"A" + struct.pack(">I", len(death)) + death),
            field("x-first-death-exchange", text("")),
            field("x-first-death-queue", text(name)),
            field("x-first-death-reason", text("rejected")),
            *(field(key, text(value)) for key, value in self.last_death("rejected", name).items()),
        ])
        flags = pika.BasicProperties.FLAG_HEADERS | pika.BasicProperties.FLAG_PRIORITY
        self.assertEqual(got.properties.raw, struct.pack(">HI", flags, len(table)) + table + b"\x03")


if __name__ == "__main__":
    unittest.main()
