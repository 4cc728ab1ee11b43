"""What the broker says no to, by the client pika: codes and texts."""

import struct
import unittest

import pika
from pika import spec

from support import Case, Field, by_release, say, send


class Refusals(Case):
    def test_what_is_not_there(self):
        q, x = self.named("missing"), self.named("x")
        there = self.queue()
        no_queue = f"NOT_FOUND - no queue '{q}' in vhost '/'"
        no_exchange = f"NOT_FOUND - no exchange '{x}' in vhost '/'"
        for text, action in [
            (no_queue, lambda channel: channel.queue_declare(q, passive=True)),
            (no_queue, lambda channel: channel.basic_consume(q, lambda *_: None)),
            (no_queue, lambda channel: channel.basic_get(q)),
            (no_queue, lambda channel: channel.queue_purge(q)),
            (no_queue, lambda channel: channel.queue_bind(q, "amq.direct", "k")),
            (no_exchange, lambda channel: channel.queue_bind(there, x, "k")),
            (no_exchange, lambda channel: channel.queue_bind(q, x, "k")),
            (no_exchange, lambda channel: channel.exchange_bind("amq.direct", x, "k")),
            (no_exchange, lambda channel: channel.exchange_bind(x, "amq.direct", "k")),
            (no_exchange, lambda channel: channel.exchange_declare(x, passive=True)),
            (no_exchange, lambda channel: channel.basic_publish(x, "k", b"")),
        ]:
            self.refused(404, text, action)
        for action in [
            lambda channel: channel.queue_bind("", "amq.direct", "k"),
            lambda channel: channel.queue_purge(""),
            lambda channel: channel.queue_delete(""),
            lambda channel: channel.basic_get(""),
            lambda channel: say(channel, spec.Basic.Consume(queue="", consumer_tag="t")),
        ]:
            self.refused(404, "NOT_FOUND - no previously declared queue", action)

    def test_declaring_otherwise(self):
        arguments = {
            "x-message-ttl": 1000, "x-max-length": 5, "x-overflow": "reject-publish", "x-max-priority": 3,
            "x-dead-letter-exchange": "dlx", "x-single-active-consumer": True,
        }
        plain, rich = self.queue("plain", exclusive=False), self.queue("rich", exclusive=False, arguments=arguments)

        def declares(queue, **settings):
            return lambda channel: channel.queue_declare(queue, **settings)

        def text(argument, queue, received, current):
            return (
                f"PRECONDITION_FAILED - inequivalent arg '{argument}' for queue '{queue}' in vhost '/': "
                f"received {received} but current is {current}"
            )

        # The same, with integers of other types, and with arguments that do not count.
        ttl = Field(b"l" + struct.pack(">q", 1000))
        self.channel.queue_declare(rich, arguments={**arguments, "x-message-ttl": ttl, "mine": 1})
        self.channel.queue_declare(plain, arguments={"x-queue-type": "classic", "mine": 1})
        for queue, settings, argument, received, current in [
            (plain, {"durable": True}, "durable", "'true'", "'false'"),
            (plain, {"auto_delete": True}, "auto_delete", "'true'", "'false'"),
            (
                plain, {"arguments": {"x-message-ttl": 1000}}, "x-message-ttl",
                "the value '1000' of type 'signedint'", "none",
            ),
            (
                rich, {}, "x-message-ttl", "none", "the value '1000' of type 'signedint'",
            ),
            (rich, {"arguments": {**arguments, "x-message-ttl": 7}}, "x-message-ttl", "'7'", "'1000'"),
            (
                rich, {"arguments": {**arguments, "x-dead-letter-exchange": "y"}}, "x-dead-letter-exchange",
                "'y'", "'dlx'",
            ),
            (
                rich, {"arguments": {**arguments, "x-overflow": "drop-head"}}, "x-overflow",
                "'drop-head'", "'reject-publish'",
            ),
            (
                rich, {"arguments": {**arguments, "x-single-active-consumer": False}}, "x-single-active-consumer",
                "'false'", "'true'",
            ),
        ]:
            self.refused(406, text(argument, queue, received, current), declares(queue, **settings))
        self.refused(
            405,
            f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{plain}' in vhost '/'. It could be "
            "originally declared on another connection or the exclusive property value does not match that of the "
            "original declaration.",
            declares(plain, exclusive=True),
        )

    def test_declaring_exchanges_otherwise(self):
        x = self.exchange(arguments={"alternate-exchange": "a"})
        of = f"exchange '{x}' in vhost '/'"
        for kind, settings, argument, received, current in [
            ("fanout", {}, "type", "'fanout'", "'direct'"),
            ("direct", {"durable": True}, "durable", "'true'", "'false'"),
            ("direct", {"auto_delete": True}, "auto_delete", "'true'", "'false'"),
            ("direct", {"internal": True}, "internal", "'true'", "'false'"),
            ("direct", {}, "alternate-exchange", "none", "the value 'a' of type 'longstr'"),
            ("direct", {"arguments": {"alternate-exchange": "b"}}, "alternate-exchange", "'b'", "'a'"),
        ]:
            text = (
                f"PRECONDITION_FAILED - inequivalent arg '{argument}' for {of}: "
                f"received {received} but current is {current}"
            )
            self.refused(406, text, lambda channel: channel.exchange_declare(x, kind, **settings))

    def test_arguments_that_cannot_be(self):
        q = self.named("q")
        for name, value, why in [
            ("x-message-ttl", -1, "{value_negative,-1}"),
            ("x-message-ttl", "a", '"expected integer, got longstr"'),
            ("x-message-ttl", Field(b"d" + bytes(8)), '"expected integer, got double"'),
            ("x-message-ttl", 2**60, "{value_too_large,1152921504606846976}"),
            ("x-expires", 0, "{value_zero,0}"),
            ("x-expires", -5, "{value_negative,-5}"),
            ("x-max-length", -1, "{value_negative,-1}"),
            ("x-max-length", True, '"expected integer, got bool"'),
            ("x-max-length-bytes", -1, "{value_negative,-1}"),
            ("x-max-priority", 256, "{max_value_exceeded,256}"),
            ("x-max-priority", -1, "{value_negative,-1}"),
            ("x-overflow", "no", "invalid_overflow"),
            ("x-overflow", 1, "{unacceptable_type,signedint}"),
            ("x-dead-letter-routing-key", "k", "routing_key_but_no_dlx_defined"),
            ("x-single-active-consumer", 1, "{unacceptable_type,signedint}"),
            ("x-queue-mode", "no", "\"unsupported queue mode 'no'\""),
            ("x-queue-type", "no", "\"unsupported queue type 'no'\""),
        ]:
            text = f"PRECONDITION_FAILED - invalid arg '{name}' for queue '{q}' in vhost '/': {why}"
            with self.subTest(name=name, value=value):
                self.refused(406, text, lambda channel: channel.queue_declare(q, arguments={name: value}))
        self.refused(
            406,
            "PRECONDITION_FAILED - invalid type 'signedint' for arg 'x-dead-letter-exchange' in "
            f"queue '{q}' in vhost '/'",
            lambda channel: channel.queue_declare(q, arguments={"x-dead-letter-exchange": 1}),
        )

    def test_exchange_arguments_that_cannot_be(self):
        x = self.named("x")
        self.refused(
            406,
            "PRECONDITION_FAILED - invalid type 'signedint' for arg 'alternate-exchange' in "
            f"exchange '{x}' in vhost '/'",
            lambda channel: channel.exchange_declare(x, arguments={"alternate-exchange": 1}),
        )
        for value, text in [
            ("x", 'Invalid x-match field value <<"x">>; expected all, any, all-with-x, or any-with-x'),
            (7, "Invalid x-match field type signedint (value 7); expected longstr"),
            (b"all", 'Invalid x-match field type binary (value <<"all">>); expected longstr'),
        ]:
            q = self.queue(exclusive=False)
            self.refused(
                406,
                f"PRECONDITION_FAILED - {text}",
                lambda channel: channel.queue_bind(q, "amq.headers", "", {"x-match": value}),
            )

    def test_consumer_arguments_that_cannot_be(self):
        q = self.queue()
        for name, value, why in [
            ("x-priority", "a", ': "expected integer, got longstr"'),
            # RabbitMQ 4 does not know it.
            *by_release([("x-cancel-on-ha-failover", 1, ": {unacceptable_type,signedint}")], []),
            ("x-stream-offset", "first", " of queue type rabbit_classic_queue"),
        ]:
            self.refused(
                406,
                f"PRECONDITION_FAILED - invalid arg '{name}' for queue '{q}' in vhost '/'{why}",
                lambda channel: channel.basic_consume(q, lambda *_: None, arguments={name: value}),
            )

    def test_acknowledging_what_is_not_outstanding(self):
        q = self.queue()
        for tag, action in [
            (1, lambda channel: channel.basic_ack(1)),
            (7, lambda channel: channel.basic_ack(7, multiple=True)),
            (0, lambda channel: channel.basic_ack(0)),
            (1, lambda channel: channel.basic_reject(1)),
            (1, lambda channel: channel.basic_nack(1)),
        ]:
            self.refused(406, f"PRECONDITION_FAILED - unknown delivery tag {tag}", action)
        self.channel.basic_ack(0, multiple=True)
        self.publish(q, b"1")
        self.get(q, auto_ack=False)
        self.channel.basic_ack(1)

        def twice(channel):
            channel.basic_publish("", q, b"1")
            self.get(q, channel, auto_ack=False)
            channel.basic_ack(1)
            channel.basic_ack(1)

        self.refused(406, "PRECONDITION_FAILED - unknown delivery tag 1", twice)

    def test_deleting_what_is_in_use(self):
        q, x = self.queue(), self.exchange()
        self.channel.queue_bind(q, x, "k")
        self.publish(q, b"1")
        of_q, of_x = f"queue '{q}' in vhost '/'", f"exchange '{x}' in vhost '/'"
        self.refused(406, f"PRECONDITION_FAILED - {of_x} in use", lambda ch: ch.exchange_delete(x, if_unused=True))
        self.refused(406, f"PRECONDITION_FAILED - {of_q} not empty", lambda ch: ch.queue_delete(q, if_empty=True))
        self.consume(q)
        self.refused(406, f"PRECONDITION_FAILED - {of_q} in use", lambda ch: ch.queue_delete(q, if_unused=True))

    def test_transactions_and_confirms_do_not_mix(self):
        def tx(channel):
            channel.confirm_delivery()
            channel.tx_select()

        def confirm(channel):
            channel.tx_select()
            channel.confirm_delivery()

        self.refused(406, "PRECONDITION_FAILED - cannot switch from confirm to tx mode", tx)
        self.refused(406, "PRECONDITION_FAILED - cannot switch from tx to confirm mode", confirm)
        no_tx = "PRECONDITION_FAILED - channel is not transactional"
        self.refused(406, no_tx, lambda channel: channel.tx_commit())
        self.refused(406, no_tx, lambda channel: channel.tx_rollback())

    def test_messages_that_cannot_be(self):
        q = self.queue()
        for properties, text in [
            ({"expiration": "abc"}, "invalid expiration 'abc': no_integer"),
            ({"expiration": "1x"}, "invalid expiration '1x': {leftover_string,\"x\"}"),
            ({"expiration": "-1"}, "invalid expiration '-1': {value_negative,-1}"),
            *by_release([({"delivery_mode": mode}, f"invalid message: {{delivery_mode_unknown,{mode}}}") for mode in (0, 7)], []),
            ({"user_id": "a"}, "user_id property set to 'a' but authenticated user was 'guest'"),
            ({"reply_to": "amq.rabbitmq.reply-to"}, "fast reply consumer does not exist"),
        ]:
            self.refused(
                406,
                f"PRECONDITION_FAILED - {text}",
                lambda channel: channel.basic_publish("", q, b"", pika.BasicProperties(**properties)),
            )
        self.assertIsNone(self.get(q))
        # RabbitMQ 4 takes any delivery mode for that of a message that is not kept.
        for mode in by_release([], [0, 7]):
            self.publish(q, b"1", delivery_mode=mode)
            self.assertEqual(self.get(q).properties.delivery_mode, mode)

    def test_direct_reply_to(self):
        name = "amq.rabbitmq.reply-to"

        def twice(channel):
            channel.basic_consume(name, lambda *_: None, auto_ack=True)
            channel.basic_consume(name, lambda *_: None, auto_ack=True)

        acks = lambda channel: channel.basic_consume(name, lambda *_: None)
        self.refused(406, "PRECONDITION_FAILED - reply consumer cannot acknowledge", acks)
        self.refused(406, "PRECONDITION_FAILED - reply consumer already set", twice)

    def test_names_that_are_the_brokers(self):
        default = "ACCESS_REFUSED - operation not permitted on the default exchange"
        q = self.queue()
        for text, action in [
            (
                "ACCESS_REFUSED - queue name 'amq.x' contains reserved prefix 'amq.*'",
                lambda ch: ch.queue_declare("amq.x"),
            ),
            (
                "ACCESS_REFUSED - exchange name 'amq.x' contains reserved prefix 'amq.*'",
                lambda ch: ch.exchange_declare("amq.x"),
            ),
            (
                "ACCESS_REFUSED - deletion of system exchange 'amq.direct' in vhost '/' not allowed",
                lambda ch: ch.exchange_delete("amq.direct"),
            ),
            (default, lambda ch: ch.exchange_declare("")),
            (default, lambda ch: ch.exchange_declare("", passive=True)),
            (default, lambda ch: ch.exchange_delete("")),
            (default, lambda ch: ch.queue_bind(q, "", "k")),
            (default, lambda ch: ch.queue_unbind(q, "", "k")),
            (default, lambda ch: ch.exchange_bind("", "amq.direct", "k")),
            (default, lambda ch: ch.exchange_bind("amq.direct", "", "k")),
        ]:
            with self.subTest(text=text):
                self.refused(403, text, action)

    def test_what_closes_the_connection(self):
        q = self.queue(exclusive=False)

        def frame(kind, payload=b"", number=None, end=b"\xce"):
            def sends(channel):
                on = channel.channel_number if number is None else number
                send(channel, struct.pack(">BHI", kind, on, len(payload)) + payload + end)

            return sends

        def reuse(channel):
            for _ in range(2):
                say(channel, spec.Basic.Consume(queue=q, consumer_tag="t"))

        def content(*frames, immediate=False):
            def sends(channel):
                say(channel, spec.Basic.Publish(routing_key=q, immediate=immediate))
                for each in frames:
                    each(channel)

            return sends

        header = frame(2, struct.pack(">HHQH", 60, 0, 4, 0))
        # A word that Erlang has not met; of one that it has, RabbitMQ says that it is invalid.
        types = [
            ("unknown exchange type 'x-coney'", lambda channel: channel.exchange_declare(q, "x-coney")),
            ("invalid exchange type ''", lambda channel: channel.exchange_declare(q, "")),
        ]
        # RabbitMQ 4 closes the channel alone.
        for text, action in by_release([], types):
            self.refused(406, f"PRECONDITION_FAILED - {text}", action)
        for code, text, action in [
            *by_release([(503, f"COMMAND_INVALID - {text}", action) for text, action in types], []),
            (540, "NOT_IMPLEMENTED - immediate=true", content(header, frame(3, b"body"), immediate=True)),
            (540, "NOT_IMPLEMENTED - prefetch_size!=0 (1)", lambda ch: ch.basic_qos(prefetch_size=1)),
            (540, "NOT_IMPLEMENTED - requeue=false", lambda ch: ch.basic_recover(requeue=False)),
            (540, "NOT_IMPLEMENTED - active=false", lambda ch: say(ch, spec.Channel.Flow(active=False))),
            (530, "NOT_ALLOWED - attempt to reuse consumer tag 't'", reuse),
            (504, "CHANNEL_ERROR - expected 'channel.open'", frame(1, b"\x00\x3c\x00\x0a" + bytes(7), 99)),
            (504, "CHANNEL_ERROR - second 'channel.open' seen", lambda ch: say(ch, spec.Channel.Open())),
            (503, "COMMAND_INVALID - unimplemented method", frame(1, b"\x00\x3c\x00\x0b")),
            (
                505, "UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead",
                content(frame(3, b"body")),
            ),
            (
                505, "UNEXPECTED_FRAME - expected content header for class 60, got one for class 50 instead",
                content(frame(2, struct.pack(">HHQH", 50, 0, 4, 0))),
            ),
            (
                505, "UNEXPECTED_FRAME - expected content body, got non content body frame instead",
                content(header, header),
            ),
            (
                505, "UNEXPECTED_FRAME - expected content body, got non content body frame instead",
                content(header, lambda ch: say(ch, spec.Basic.Qos())),
            ),
            (505, "UNEXPECTED_FRAME - expected method frame, got non method frame instead", header),
            (505, "UNEXPECTED_FRAME - expected method frame, got non method frame instead", frame(3, b"body")),
            (
                505, "UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead",
                content(frame(2, struct.pack(">HHQH", 60, 1, 0, 0))),
            ),
            (505, "UNEXPECTED_FRAME - type 8, all octets = <<>>", frame(8)),
            (501, "FRAME_ERROR - type 8, all octets = <<\"x\">>: unknown_frame", frame(8, b"x", 0)),
            (501, "FRAME_ERROR - Malformed UTF-8 in shortstr", frame(1, b"\x00\x3c\x00\x1e\x02\xff\xfe\x00")),
            (501, "FRAME_ERROR - type 1, all octets = <<>>: {invalid_frame_end_marker,0}", frame(1, end=b"\x00")),
            (501, "FRAME_ERROR - type 9, all octets = <<\"abc\">>: unknown_frame", frame(9, b"abc")),
            (
                501, 'FRAME_ERROR - type 1, first 16 octets = <<"abcdefghijklmnop">>: {invalid_frame_end_marker,1}',
                frame(1, b"abcdefghijklmnopq", end=b"\x01"),
            ),
            (501, "FRAME_ERROR - cannot decode <<0,0>>", frame(1, b"\x00\x32\x00\x0a\x00\x00")),
            (
                501, "FRAME_ERROR - type 3, all octets = <<>>: {frame_too_large,131077,131064}",
                lambda ch: send(ch, b"\x03\x00\x01" + struct.pack(">I", 131077)),
            ),
        ]:
            with self.subTest(text=text):
                self.refused_connection(code, text, action)


class Logins(Case):
    def test_virtual_hosts_that_are_not_there(self):
        with self.assertRaises(pika.exceptions.ProbableAccessDeniedError) as caught:
            self.connect(virtual_host="nope")
        self.assertIn("(530) 'NOT_ALLOWED - vhost nope not found'", str(caught.exception))

    def test_wrong_passwords(self):
        with self.assertRaises(pika.exceptions.ProbableAuthenticationError) as caught:
            self.connect(credentials=pika.PlainCredentials("guest", "wrong"))
        self.assertIn(
            "(403) 'ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. "
            "For details see the broker logfile.'",
            str(caught.exception),
        )

    def test_limits_are_negotiated(self):
        connection, channel = self.connect(channel_max=2, frame_max=4096, heartbeat=5)
        body = b"x" * 20_000
        q = self.queue(channel=channel)
        channel.basic_publish("", q, body)
        self.assertEqual(channel.basic_get(q, True)[2], body)
        connection.channel()
        self.assertRaises(pika.exceptions.NoFreeChannels, connection.channel)
        self.refused_connection(
            530,
            "NOT_ALLOWED - number of channels opened (2) has reached the negotiated channel_max (2)",
            lambda channel: [send(channel, struct.pack(">BHIHHBB", 1, n, 5, 20, 10, 0, 0xCE)) for n in (2, 3)],
            channel_max=2,
        )


if __name__ == "__main__":
    unittest.main()
