"""Exchanges and what they route where, by the client pika."""

import unittest

import pika

from support import Case


class Routing(Case):
    def routed(self, exchange, key, queues, headers=None):
        """Publishes and says which of the queues have got it."""
        self.channel.basic_publish(exchange, key, key, pika.BasicProperties(headers=headers))
        return [queue[len(self.name) + 1:] for queue in queues if self.get(queue)]

    def test_the_exchanges_there_are_from_the_beginning(self):
        kinds = {
            "amq.direct": "direct", "amq.fanout": "fanout", "amq.topic": "topic", "amq.headers": "headers",
            "amq.match": "headers",
        }
        for name, kind in kinds.items():
            self.channel.exchange_declare(name, kind, durable=True)
        self.channel.exchange_declare("amq.rabbitmq.trace", "topic", durable=True, internal=True)

    def test_direct_and_fanout(self):
        a, b = self.queue("a"), self.queue("b")
        direct, fanout = self.exchange("direct"), self.exchange("fanout", "fanout")
        self.channel.queue_bind(a, direct, "one")
        self.channel.queue_bind(b, direct, "one")
        self.channel.queue_bind(b, direct, "two")
        self.channel.queue_bind(a, fanout, "whatever")
        for key, wanted in [("one", ["a", "b"]), ("two", ["b"]), ("ONE", []), ("", [])]:
            self.assertEqual(self.routed(direct, key, [a, b]), wanted)
        self.assertEqual(self.routed(fanout, "else", [a, b]), ["a"])
        self.channel.queue_unbind(b, direct, "one")
        self.assertEqual(self.routed(direct, "one", [a, b]), ["a"])

    def test_a_message_comes_once_to_a_queue_however_often_it_is_bound(self):
        a, exchange = self.queue("a"), self.exchange(kind="topic")
        for key in ["#", "*", "k", "k"]:
            self.channel.queue_bind(a, exchange, key)
        self.publish("k", b"1", exchange=exchange)
        self.assertEqual(self.bodies(a), [b"1"])

    def test_topics(self):
        exchange = self.exchange(kind="topic")
        patterns = ["#", "*", "a.*", "a.#", "*.b", "#.b", "a.b", "", "a.*.c", "#.a.#", "*.*"]
        queues = {pattern: self.queue(f"q{n}") for n, pattern in enumerate(patterns)}
        for pattern, queue in queues.items():
            self.channel.queue_bind(queue, exchange, pattern)
        wanted = {
            "": ["#", ""],
            "a": ["#", "*", "a.#", "#.a.#"],
            "b": ["#", "*", "#.b"],
            "a.b": ["#", "a.*", "a.#", "*.b", "#.b", "a.b", "#.a.#", "*.*"],
            "a.b.c": ["#", "a.#", "a.*.c", "#.a.#"],
            "x.a.y": ["#", "#.a.#"],
            ".": ["#", "*.*"],
            ".b": ["#", "*.b", "#.b", "*.*"],
            "a.": ["#", "a.*", "a.#", "#.a.#", "*.*"],
            "a..c": ["#", "a.#", "a.*.c", "#.a.#"],
        }
        for key, expected in wanted.items():
            self.channel.basic_publish(exchange, key, b"")
            self.assertEqual([pattern for pattern, queue in queues.items() if self.bodies(queue)], expected, key)

    def test_headers(self):
        exchange = self.exchange(kind="headers")
        bindings = {
            "all": {"x-match": "all", "a": 1, "b": "x"},
            "any": {"x-match": "any", "a": 1, "b": "x"},
            "default": {"a": 1, "b": "x"},
            "present": {"a": None},
            "nothing": {},
            "any-of-nothing": {"x-match": "any"},
            "x-ignored": {"x-match": "all", "a": 1, "x-a": 2},
            "all-with-x": {"x-match": "all-with-x", "a": 1, "x-a": 2},
            "any-with-x": {"x-match": "any-with-x", "x-a": 2},
        }
        queues = [self.queue(what) for what in bindings]
        for queue, arguments in zip(queues, bindings.values()):
            self.channel.queue_bind(queue, exchange, "", arguments)
        for headers, wanted in [
            ({}, ["nothing"]),
            (None, ["nothing"]),
            ({"a": 1}, ["any", "present", "nothing", "x-ignored"]),
            ({"a": 2}, ["present", "nothing"]),
            ({"a": 1, "b": "x", "c": 0}, ["all", "any", "default", "present", "nothing", "x-ignored"]),
            ({"b": "x"}, ["any", "nothing"]),
            ({"a": 1, "x-a": 2}, ["any", "present", "nothing", "x-ignored", "all-with-x", "any-with-x"]),
            ({"a": "1"}, ["present", "nothing"]),
            ({"a": 2**40}, ["present", "nothing"]),
            ({"a": None}, ["present", "nothing"]),
            ({"a": True}, ["present", "nothing"]),
        ]:
            self.assertEqual(self.routed(exchange, "", queues, headers), wanted, headers)

    def test_from_exchange_to_exchange(self):
        a, b = self.queue("a"), self.queue("b")
        first, second = self.exchange("first", "topic"), self.exchange("second")
        self.channel.exchange_bind(second, first, "to.#")
        self.channel.exchange_bind(first, second, "back")
        self.channel.queue_bind(a, second, "to.a")
        self.channel.queue_bind(b, first, "to.*")
        self.assertEqual(self.routed(first, "to.a", [a, b]), ["a", "b"])
        self.assertEqual(self.routed(first, "to.b", [a, b]), ["b"])
        self.assertEqual(self.routed(second, "to.a", [a, b]), ["a"])
        # A circle ends.
        self.assertEqual(self.routed(second, "back", [a, b]), [])
        self.channel.exchange_unbind(second, first, "to.#")
        self.assertEqual(self.routed(first, "to.a", [a, b]), ["b"])

    def test_the_alternate_of_an_exchange(self):
        a, spare = self.queue("a"), self.queue("spare")
        alternate = self.exchange("alternate", "fanout")
        main = self.exchange("main", arguments={"alternate-exchange": alternate})
        self.channel.queue_bind(a, main, "a")
        self.channel.queue_bind(spare, alternate)
        self.assertEqual(self.routed(main, "a", [a, spare]), ["a"])
        self.assertEqual(self.routed(main, "b", [a, spare]), ["spare"])
        self.channel.confirm_delivery()
        self.channel.basic_publish(main, "b", b"", mandatory=True)
        self.channel.queue_unbind(spare, alternate)
        with self.assertRaises(pika.exceptions.UnroutableError):
            self.channel.basic_publish(main, "b", b"", mandatory=True)

    def test_auto_delete_exchanges_go_with_their_last_binding(self):
        a = self.queue("a")
        one = self.exchange("one", auto_delete=True)
        two = self.exchange("two", auto_delete=True)
        self.channel.exchange_bind(two, one, "k")
        self.channel.queue_bind(a, two, "k")
        self.channel.queue_delete(a)
        # The second goes with the queue, and the first with the second.
        for name in [one, two]:
            self.refused(
                404,
                f"NOT_FOUND - no exchange '{name}' in vhost '/'",
                lambda channel: channel.exchange_declare(name, passive=True),
            )

    def test_internal_exchanges_take_from_exchanges_only(self):
        a = self.queue("a")
        outer, inner = self.exchange("outer"), self.exchange("inner", internal=True)
        self.channel.queue_bind(a, inner, "k")
        self.channel.exchange_bind(inner, outer, "k")
        self.assertEqual(self.routed(outer, "k", [a]), ["a"])
        self.refused(
            403,
            f"ACCESS_REFUSED - cannot publish to internal exchange '{inner}' in vhost '/'",
            lambda channel: channel.basic_publish(inner, "k", b""),
        )

    def test_copies_by_way_of_an_exchange(self):
        a, b, c = self.queue("a"), self.queue("b"), self.queue("c")
        exchange = self.exchange()
        for queue in [a, b, c]:
            self.channel.queue_bind(queue, exchange, queue)
        headers = {"CC": [b, "nowhere", 7], "BCC": [c]}
        self.assertEqual(self.routed(exchange, "", [a, b, c], headers), ["b", "c"])
        self.refused(
            406,
            'PRECONDITION_FAILED - invalid message: {unacceptable_type_in_header,"CC",longstr}',
            lambda channel: channel.basic_publish(exchange, "", b"", pika.BasicProperties(headers={"CC": a})),
        )

    def test_bindings_go_with_their_queue(self):
        name = self.queue()
        exchange = self.exchange(kind="fanout")
        self.channel.queue_bind(name, exchange)
        self.channel.queue_delete(name)
        self.queue()
        self.publish("", b"1", exchange=exchange)
        self.assertIsNone(self.get(name))


if __name__ == "__main__":
    unittest.main()
