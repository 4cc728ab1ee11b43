"""Messages, by the client pika: published, consumed, got, settled."""

import struct
import unittest

import pika
from pika.exceptions import NackError, UnroutableError

from support import Case, Field, by_release, say


class Connecting(Case):
    def test_the_broker_says_what_clients_branch_on(self):
        connection = self.connection._impl
        properties = connection.server_properties
        self.assertEqual(properties["product"], "RabbitMQ")
        self.assertRegex(properties["version"], by_release(r"^3\.10\.\d+$", r"^4\.0\.\d+$"))
        self.assertEqual(
            properties["capabilities"],
            {
                "publisher_confirms": True,
                "exchange_exchange_bindings": True,
                "basic.nack": True,
                "consumer_cancel_notify": True,
                "connection.blocked": True,
                "consumer_priorities": True,
                "authentication_failure_close": True,
                "per_consumer_qos": True,
                "direct_reply_to": True,
            },
        )
        for name in ["platform", "copyright", "information", "cluster_name"]:
            self.assertIsInstance(properties[name], str)
        tuned = connection.params
        self.assertEqual((tuned.channel_max, tuned.frame_max, tuned.heartbeat), (2047, 131072, 60))

    def test_channel_numbers_are_reusable_right_after_closing(self):
        for _ in range(20):
            channel = self.connection.channel(7)
            channel.close()

    def test_a_secret_can_be_renewed(self):
        self.connection.update_secret("guest", "renewal")
        self.queue()


class Declaring(Case):
    def test_declaring_says_what_there_is(self):
        name = self.named("q")
        first = self.channel.queue_declare(name, exclusive=True).method
        self.assertEqual((first.queue, first.message_count, first.consumer_count), (name, 0, 0))
        self.publish(name, b"1", b"2")
        self.connection.channel().basic_consume(name, lambda *_: None)
        self.until_waiting(0, name)
        again = self.channel.queue_declare(name, exclusive=True).method
        self.assertEqual((again.message_count, again.consumer_count), (0, 1))

    def test_the_broker_makes_names(self):
        name = self.channel.queue_declare("", exclusive=True).method.queue
        self.assertRegex(name, r"^amq\.gen-[A-Za-z0-9_-]{22}$")
        self.publish(name, b"1")
        # The last queue declared is what an empty name stands for.
        self.assertEqual(self.channel.queue_delete("").method.message_count, 1)

    def test_an_empty_name_and_key_are_those_of_the_last_queue(self):
        exchange = self.exchange()
        name = self.queue()
        # pika puts the queue's name where the key is None; the broker does where both are empty.
        self.channel.queue_bind("", exchange, "")
        self.publish(name, b"1", exchange=exchange)
        self.assertEqual(self.bodies(""), [b"1"])

    def test_line_ends_are_no_part_of_a_name(self):
        name = self.named("q")
        # pika would wait for an answer with the name it asked for.
        say(self.channel, pika.spec.Queue.Declare(queue=f"{name}\r\n", exclusive=True, nowait=True))
        self.assertEqual(self.channel.queue_declare(name, passive=True).method.queue, name)

    def test_deleting_and_unbinding_what_is_not_there_is_fine(self):
        name = self.queue()
        self.assertEqual(self.channel.queue_delete(self.named("missing")).method.message_count, 0)
        self.channel.exchange_delete(self.named("missing"))
        self.channel.queue_unbind(name, "amq.direct", "never bound")
        self.channel.exchange_unbind("amq.fanout", "amq.direct", "never bound")
        self.publish(name, b"1", b"2")
        self.assertEqual(self.channel.queue_purge(name).method.message_count, 2)
        self.publish(name, b"1")
        self.assertEqual(self.channel.queue_delete(name).method.message_count, 1)

    def test_exclusive_queues_go_with_their_connection(self):
        other, channel = self.connect()
        name = self.queue(channel=channel)
        channel.queue_bind(name, "amq.direct", "bound")
        locked = (
            f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be "
            "originally declared on another connection or the exclusive property value does not match that of the "
            "original declaration."
        )
        for action in [
            lambda ours: ours.queue_declare(name, exclusive=True),
            lambda ours: ours.queue_declare(name, passive=True),
            lambda ours: ours.queue_bind(name, "amq.direct", "k"),
            lambda ours: ours.queue_unbind(name, "amq.direct", "bound"),
            lambda ours: ours.queue_purge(name),
            lambda ours: ours.queue_delete(name),
            lambda ours: ours.basic_get(name),
            lambda ours: ours.basic_consume(name, lambda *_: None),
        ]:
            self.refused(405, locked, action)
        # A binding that is not there is as good as removed, whoever asks.
        self.channel.queue_unbind(name, "amq.direct", "never bound")
        # Not locked for publishing, and locked for the owner if he says it is not exclusive.
        self.publish(name, b"1")
        with self.assertRaises(pika.exceptions.ChannelClosedByBroker) as caught:
            channel.queue_declare(name)
        self.assertEqual((caught.exception.reply_code, caught.exception.reply_text), (405, locked))
        other.close()
        self.refused(
            404,
            f"NOT_FOUND - no queue '{name}' in vhost '/'",
            lambda ours: ours.queue_declare(name, passive=True),
        )

    def test_auto_delete_queues_go_with_their_last_consumer(self):
        name = self.queue(exclusive=False, auto_delete=True)
        self.channel.queue_declare(name, passive=True)
        one = self.consume(name)[1]
        two = self.consume(name)[1]
        self.channel.basic_cancel(one)
        self.channel.queue_declare(name, passive=True)
        self.channel.basic_cancel(two)
        gone = f"NOT_FOUND - no queue '{name}' in vhost '/'"
        self.refused(404, gone, lambda channel: channel.queue_declare(name, passive=True))
        # With the channel of the consumer, too.
        name = self.queue("second", exclusive=False, auto_delete=True)
        channel = self.connection.channel()
        self.consume(name, channel)
        channel.close()
        gone = f"NOT_FOUND - no queue '{name}' in vhost '/'"
        self.refused(404, gone, lambda channel: channel.queue_declare(name, passive=True))

    def test_unused_queues_expire(self):
        name = self.queue(exclusive=False, arguments={"x-expires": 100})
        used = self.queue("used", exclusive=False, arguments={"x-expires": 100})
        self.consume(used)

        def gone():
            channel = self.connection.channel()
            try:
                # Deleting what is not there is fine, and no use, unlike declaring.
                channel.queue_bind(name, "amq.direct", "k")
                channel.close()
                return False
            except pika.exceptions.ChannelClosedByBroker as refusal:
                self.assertEqual(refusal.reply_text, f"NOT_FOUND - no queue '{name}' in vhost '/'")
                return True

        self.until("the queue is gone", gone)
        self.channel.queue_declare(used, passive=True)


class Publishing(Case):
    def test_confirms(self):
        name = self.queue()
        self.channel.confirm_delivery()
        for n in range(100):
            self.publish(name, b"%d" % n)
        self.assertEqual(self.bodies(name), [b"%d" % n for n in range(100)])

    def test_unroutable_messages_come_back_if_mandatory(self):
        self.channel.confirm_delivery()
        self.channel.basic_publish("", self.named("missing"), b"gone")
        with self.assertRaises(UnroutableError) as caught:
            properties = pika.BasicProperties(headers={"n": 1}, message_id="m")
            self.channel.basic_publish("amq.direct", "nowhere", b"back", properties, mandatory=True)
        (returned,) = caught.exception.messages
        method = returned.method
        self.assertEqual(
            (method.reply_code, method.reply_text, method.exchange, method.routing_key),
            (312, "NO_ROUTE", "amq.direct", "nowhere"),
        )
        self.assertEqual((returned.body, returned.properties.headers["n"]), (b"back", 1))
        self.assertEqual(returned.properties.message_id, "m")

    def test_returned_without_confirms(self):
        returned = []
        self.channel.add_on_return_callback(lambda *message: returned.append(message))
        self.channel.basic_publish("", self.named("missing"), b"back", mandatory=True)
        self.until("it is returned", lambda: returned)
        self.assertEqual(returned[0][3], b"back")

    def test_a_full_queue_nacks(self):
        name = self.queue(arguments={"x-max-length": 2, "x-overflow": "reject-publish"})
        self.channel.confirm_delivery()
        self.publish(name, b"1", b"2")
        with self.assertRaises(NackError):
            self.publish(name, b"3")
        self.assertEqual(self.get(name).body, b"1")
        self.publish(name, b"4")
        self.assertEqual(self.bodies(name), [b"2", b"4"])

    def test_a_full_queue_drops_from_its_head(self):
        name = self.queue(arguments={"x-max-length": 2})
        self.channel.confirm_delivery()
        self.publish(name, b"1", b"2", b"3")
        self.assertEqual(self.bodies(name), [b"2", b"3"])
        name = self.queue("bytes", arguments={"x-max-length-bytes": 10})
        self.publish(name, b"12345", b"67890", b"abc")
        self.assertEqual(self.bodies(name), [b"67890", b"abc"])

    def test_bodies_of_every_size(self):
        name = self.queue()
        frame = 131072 - 8
        for size in [0, 1, frame - 1, frame, frame + 1, 2 * frame, 1 << 20]:
            body = bytes(n % 251 for n in range(1000)) * (size // 1000 + 1)
            self.publish(name, body[:size])
            self.assertEqual(self.get(name).body, body[:size])

    def test_every_property(self):
        name = self.queue()
        sent = dict(
            content_type="text/plain", content_encoding="gzip", headers={"a": 1}, delivery_mode=2, priority=9,
            correlation_id="c", reply_to="r", expiration="60000", message_id="m", timestamp=1_700_000_000, type="t",
            user_id="guest", app_id="a", cluster_id="ü",
        )
        self.publish(name, b"", **sent)
        got = self.get(name).properties
        self.assertEqual({field: getattr(got, field) for field in sent}, sent)

    def test_headers_of_every_type_byte_by_byte(self):
        name, final = self.queue("q"), self.queue("final")
        nested = b"\x01aA\x00\x00\x00\x05I\xff\xff\xff\xfe" + b"\x01bF\x00\x00\x00\x03\x01ct"[:-1] + b"V"
        fields = {
            "bool": Field(b"t\x01"),
            "false": Field(b"t\x00"),
            "i8": Field(b"b\x80"),
            "u8": Field(b"B\xff"),
            "i16": Field(b"s\x80\x01"),
            "u16": Field(b"u\xff\xfe"),
            "i32": Field(b"I\x80\x00\x00\x01"),
            "u32": Field(b"i\xff\xff\xff\xfe"),
            "i64": Field(b"l\x80\x00\x00\x00\x00\x00\x00\x01"),
            "I64": Field(b"L\x7f\xff\xff\xff\xff\xff\xff\xff"),
            "f32": Field(b"f" + struct.pack(">f", 1.5)),
            "f64": Field(b"d" + struct.pack(">d", -0.1)),
            "decimal": Field(b"D\x02" + struct.pack(">I", 12345)),
            "text": Field(b"S\x00\x00\x00\x03\xc3\xbc\xff"),
            "empty": Field(b"S\x00\x00\x00\x00"),
            "array": Field(b"A\x00\x00\x00\x07t\x01S\x00\x00\x00\x00"),
            "time": Field(b"T" + struct.pack(">Q", 1_700_000_000)),
            "table": Field(b"F" + struct.pack(">I", len(nested)) + nested),
            "void": Field(b"V"),
            "bytes": Field(b"x\x00\x00\x00\x04\x00\xff\xfe\xce"),
        }
        properties = pika.BasicProperties(headers=fields, content_type="x", priority=0)
        sent = b"".join(properties.encode())
        # RabbitMQ 4 writes headers anew, in the order of their names, and knows one type of 64 bits.
        anew = {**fields, "I64": Field(b"l" + fields["I64"][1:])}
        anew = pika.BasicProperties(headers=dict(sorted(anew.items())), content_type="x", priority=0)
        sent = by_release(sent, b"".join(anew.encode()))
        self.channel.basic_publish("", name, b"b", properties)
        self.assertEqual(self.get(name).properties.raw, sent)
        # By way of an exchange that looks at them.
        headers = self.exchange(kind="headers")
        self.channel.queue_bind(final, headers, "", {"i8": -128, "x-match": "all"})
        self.channel.basic_publish(headers, "", b"b", properties)
        self.assertEqual(self.get(final).properties.raw, sent)

    def test_carbon_copies(self):
        to, cc, bcc = self.queue("to"), self.queue("cc"), self.queue("bcc")
        self.publish(to, b"1", headers={"CC": [cc], "BCC": [bcc], "other": 1})
        for name in [to, cc, bcc]:
            got = self.get(name)
            self.assertEqual((got.method.routing_key, got.headers), (to, {"CC": [cc], "other": 1}))


class Transactions(Case):
    def test_commit_and_rollback_of_messages_and_acks(self):
        name = self.queue()
        other = self.connection.channel()
        self.channel.tx_select()
        self.publish(name, b"1", b"2")
        self.assertIsNone(self.get(name, other))
        self.channel.tx_rollback()
        self.assertIsNone(self.get(name, other))
        self.publish(name, b"3")
        self.channel.tx_commit()
        got = self.get(name, auto_ack=False)
        self.assertEqual(got.body, b"3")
        self.channel.basic_ack(got.tag)
        self.channel.tx_rollback()
        # After a rollback the ack may be given again.
        self.channel.basic_ack(got.tag)
        self.channel.tx_commit()
        self.channel.close()
        self.assertIsNone(self.get(name, other))

    def test_what_is_not_committed_goes_with_the_channel(self):
        name = self.queue()
        self.publish(name, b"1")
        self.until_waiting(1, name)
        channel = self.connection.channel()
        channel.tx_select()
        channel.basic_publish("", name, b"2")
        channel.basic_ack(self.get(name, channel, auto_ack=False).tag)
        channel.close()
        self.until_waiting(1, name)
        got = self.get(name)
        self.assertEqual((got.body, got.redelivered), (b"1", True))
        self.assertIsNone(self.get(name))


class Consuming(Case):
    def test_deliveries_in_order_and_cancelling(self):
        name = self.queue()
        self.publish(name, b"1", b"2")
        got, tag = self.consume(name, consumer_tag="mine")
        self.publish(name, b"3")
        taken = self.take(got, 3)
        self.assertEqual([message.body for message in taken], [b"1", b"2", b"3"])
        self.assertEqual([message.tag for message in taken], [1, 2, 3])
        self.assertEqual({message.method.consumer_tag for message in taken}, {"mine"})
        self.assertFalse(any(message.redelivered for message in taken))
        # pika gives unsettled deliveries back when it cancels, so some are settled first.
        self.channel.basic_ack(2, multiple=True)
        self.channel.basic_cancel(tag)
        self.publish(name, b"4")
        self.settle(name)
        self.assertEqual(got, [])
        self.channel.close()
        self.channel = self.connection.channel()
        self.until_waiting(2, name)
        self.assertEqual(self.bodies(name), [b"3", b"4"])

    def test_requeued_messages_come_again_where_they_were(self):
        name = self.queue()
        self.publish(name, b"1", b"2", b"3", b"4")
        one, two, three = (self.get(name, auto_ack=False) for _ in range(3))
        self.assertEqual(one.method.message_count, 3)
        self.channel.basic_nack(three.tag)
        self.channel.basic_reject(one.tag)
        self.channel.basic_nack(two.tag, multiple=True)
        again = [self.get(name) for _ in range(4)]
        self.assertEqual(
            [(got.body, got.redelivered) for got in again],
            [(b"1", True), (b"2", True), (b"3", True), (b"4", False)],
        )

    def test_recovering_gives_everything_back(self):
        name = self.queue()
        self.publish(name, b"1", b"2")
        got, tag = self.consume(name)
        self.take(got, 2)
        self.channel.basic_recover(requeue=True)
        again = self.take(got, 2)
        self.assertEqual([(got.body, got.redelivered, got.tag) for got in again], [(b"1", True, 3), (b"2", True, 4)])
        self.channel.basic_ack(0, multiple=True)
        self.settle(name)
        self.channel.close()
        self.channel = self.connection.channel()
        self.assertIsNone(self.get(name))

    def test_a_lost_connection_gives_everything_back(self):
        other, channel = self.connect()
        name = self.queue(exclusive=False)
        self.publish(name, *(b"%d" % n for n in range(10)))
        self.until_waiting(10, name)
        for _ in range(5):
            self.get(name, channel, auto_ack=False)
        other.close()
        self.until_waiting(10, name)
        got = [self.get(name) for _ in range(10)]
        self.assertEqual([(m.body, m.redelivered) for m in got], [(b"%d" % n, n < 5) for n in range(10)])

    def test_prefetch_per_consumer(self):
        name = self.queue()
        self.channel.basic_qos(prefetch_count=2)
        one, _ = self.consume(name)
        self.channel.basic_qos(prefetch_count=1)
        two, _ = self.consume(name)
        self.publish(name, *(b"%d" % n for n in range(6)))
        self.until("both have what they can take", lambda: (len(one), len(two)) == (2, 1))
        self.settle(name)
        self.assertEqual((len(one), len(two)), (2, 1))
        self.channel.basic_ack(two[0].tag)
        self.until("there is room for one more", lambda: (len(one), len(two)) == (2, 2))
        # Getting is not limited.
        self.assertEqual(self.get(name).body, b"4")

    def test_prefetch_per_channel(self):
        name = self.queue()
        self.channel.basic_qos(prefetch_count=2, global_qos=True)
        one, _ = self.consume(name)
        two, _ = self.consume(name)
        self.publish(name, b"1", b"2", b"3", b"4", b"5")
        self.until("two are delivered", lambda: len(one) + len(two) == 2)
        # Who need not acknowledge is held up too.
        unlimited, _ = self.consume(name, auto_ack=True)
        self.settle(name)
        self.assertEqual((len(one) + len(two), unlimited), (2, []))

    def test_consumers_of_a_queue_take_turns(self):
        name = self.queue()
        lists = [self.consume(name)[0] for _ in range(3)]
        self.publish(name, *(b"%d" % n for n in range(6)))
        self.until("all are delivered", lambda: sum(map(len, lists)) == 6)
        self.assertEqual([[m.body for m in got] for got in lists], [[b"0", b"3"], [b"1", b"4"], [b"2", b"5"]])

    def test_consumers_of_higher_priority_come_first(self):
        name = self.queue()
        self.channel.basic_qos(prefetch_count=2)
        low, _ = self.consume(name, arguments={"x-priority": -1})
        high, _ = self.consume(name, arguments={"x-priority": 10})
        middle, _ = self.consume(name)
        self.publish(name, *(b"%d" % n for n in range(6)))
        self.until("all are delivered", lambda: len(high) + len(middle) + len(low) == 6)
        self.assertEqual([m.body for m in high + middle + low], [b"%d" % n for n in range(6)])

    def test_one_consumer_at_a_time(self):
        name = self.queue(arguments={"x-single-active-consumer": True})
        one, tag = self.consume(name, auto_ack=True)
        two, _ = self.consume(name, auto_ack=True)
        self.publish(name, b"1", b"2")
        self.until("both are delivered", lambda: len(one) == 2)
        self.settle(name)
        self.assertEqual((len(one), len(two)), (2, 0))
        self.channel.basic_cancel(tag)
        self.publish(name, b"3")
        self.assertEqual(self.take(two, 1)[0].body, b"3")

    def test_an_exclusive_consumer_keeps_others_out(self):
        name = self.queue()
        _, tag = self.consume(name, exclusive=True)
        text = f"ACCESS_REFUSED - queue '{name}' in vhost '/' in exclusive use"
        self.refused(403, text, lambda channel: channel.basic_consume(name, lambda *_: None))
        self.channel.basic_cancel(tag)
        self.consume(name)
        self.refused(403, text, lambda channel: channel.basic_consume(name, lambda *_: None, exclusive=True))

    def test_the_broker_cancels_consumers_of_a_deleted_queue(self):
        name = self.queue()
        cancelled = []
        self.channel.add_on_cancel_callback(lambda frame: cancelled.append(frame.method.consumer_tag))
        tags = {self.consume(name)[1], self.consume(name)[1]}
        self.connection.channel().queue_delete(name)
        self.until("both are cancelled", lambda: set(cancelled) == tags)

    def test_priorities(self):
        name = self.queue(arguments={"x-max-priority": 5})
        for priority in [None, 1, 5, 3, 200, 1]:
            self.publish(name, str(priority).encode(), priority=priority)
        self.assertEqual(self.bodies(name), [b"5", b"200", b"3", b"1", b"1", b"None"])

    def test_direct_reply_to(self):
        requests = self.queue("requests")
        answers, _ = self.consume("amq.rabbitmq.reply-to", auto_ack=True)
        self.publish(requests, b"ask", reply_to="amq.rabbitmq.reply-to", correlation_id="7")
        request = self.get(requests)
        address = request.properties.reply_to
        self.assertRegex(address, r"^amq\.rabbitmq\.reply-to\..+$")
        server = self.connection.channel()
        declared = server.queue_declare(address, passive=True).method
        self.assertEqual((declared.queue, declared.message_count, declared.consumer_count), (address, 0, 1))
        server.confirm_delivery()
        properties = pika.BasicProperties(correlation_id="7", headers={"a": 1})
        server.basic_publish("", address, b"answer", properties)
        (answer,) = self.take(answers, 1)
        self.assertEqual((answer.body, answer.properties.correlation_id), (b"answer", "7"))
        self.assertEqual((answer.method.exchange, answer.method.routing_key), ("", address))
        self.assertEqual((answer.tag, answer.redelivered, answer.headers), (2, False, {"a": 1}))
        # It is no queue: what must be routed counts as not routed, and arrives.
        with self.assertRaises(UnroutableError):
            server.basic_publish("", address, b"more", mandatory=True)
        (more,) = self.take(answers, 1)
        # Answers are not counted: there is nothing to acknowledge.
        self.assertEqual((more.body, more.tag), (b"more", 2))
        self.channel.close()
        gone = f"NOT_FOUND - no queue '{address}' in vhost '/'"
        self.refused(404, gone, lambda channel: channel.queue_declare(address, passive=True))


if __name__ == "__main__":
    unittest.main()
