"""Workers and RPC: Python programs and ours call each other, gzip JSON on the wire.

The programs of ours are the examples, in CONEY_EXAMPLES.
"""

import asyncio
import contextlib
import gzip
import json
import os
import signal
import subprocess
import threading
import uuid

import aio_pika
import pika
from aio_pika.patterns import RPC
from support import PATIENCE, URL, Case

EXAMPLES = os.environ["CONEY_EXAMPLES"]


def pack(value):
    return gzip.compress(json.dumps(value).encode("utf-8"))


def unpack(body):
    return json.loads(gzip.decompress(body).decode("utf-8"))


def command(name, *arguments):
    return [os.path.join(EXAMPLES, name), *arguments]


ENVIRONMENT = {**os.environ, "CONEY_BROKER__URL": URL, "RUST_LOG": "info"}


@contextlib.contextmanager
def running(name):
    """An example that is listening."""
    program = subprocess.Popen(
        command(name), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(PATIENCE, program.kill)
    watchdog.start()
    try:
        for line in program.stderr:
            if "listening" in line:
                break
        # Whoever writes to a pipe that nobody reads stops.
        threading.Thread(target=program.stderr.read, daemon=True).start()
        yield program
    finally:
        program.send_signal(signal.SIGTERM)
        status = program.wait()
        watchdog.cancel()
        for pipe in (program.stdout, program.stderr):
            pipe.close()
    assert status == 0, f"{name} ended with {status}"


class GzipJsonRPC(RPC):
    """aio-pika's RPC pattern with the serializer of the guide."""

    CONTENT_TYPE = "application/json"

    def serialize(self, data):
        return pack(data)

    def deserialize(self, data):
        return unpack(data)


class Workers(Case):
    def test_a_python_program_publishes_to_our_queue_worker(self):
        with running("queue_worker") as worker:
            for text in ("hello", "grüße"):
                self.channel.basic_publish("", "a-queue", pack(text))
                self.assertEqual(worker.stdout.readline(), f"data received {text}\n")
            self.channel.basic_publish("", "another-route", json.dumps([1, 2]).encode())
            self.assertEqual(worker.stdout.readline(), "another-route: [1,2]\n")

    def test_a_python_program_calls_our_rpc_worker_through_a_callback_queue(self):
        with running("rpc_worker"):
            callback = self.channel.queue_declare("", exclusive=True).method.queue
            for request, answer in [
                ({"data": "hello"}, {"success": True, "data": "data received hello"}),
                ("bare", {"success": True, "data": "data received bare"}),
            ]:
                properties, body = self.call(callback, pack(request))
                self.assertEqual(properties.type, "result")
                self.assertEqual(unpack(body), answer)
            _, body = self.call(callback, pack({"data": ""}))
            answer = unpack(body)
            self.assertFalse(answer["success"])
            self.assertEqual(
                {key: answer["error"][key] for key in ("type", "message", "args")},
                {"type": "String", "message": "there is no text", "args": ["there is no text"]},
            )
            _, body = self.call(callback, b"no gzip and no JSON")
            self.assertFalse(unpack(body)["success"])

    def call(self, callback, body):
        correlation_id = str(uuid.uuid4())
        properties = pika.BasicProperties(reply_to=callback, correlation_id=correlation_id)
        self.channel.basic_publish("", "a-route", body, properties)
        for _, answered, answer in self.channel.consume(callback, auto_ack=True, inactivity_timeout=PATIENCE):
            self.assertIsNotNone(answered, "no answer")
            self.channel.cancel()
            self.assertEqual(answered.correlation_id, correlation_id)
            return answered, answer

    def test_aio_pikas_rpc_pattern_calls_our_rpc_worker(self):
        async def calls():
            connection = await aio_pika.connect(URL)
            async with connection:
                channel = await connection.channel()
                rpc = await GzipJsonRPC.create(channel)
                texts = [f"number {n}" for n in range(10)]
                answers = [rpc.call("a-route", kwargs={"data": text}) for text in texts]
                for text, answer in zip(texts, await asyncio.wait_for(asyncio.gather(*answers), PATIENCE)):
                    self.assertEqual(answer, {"success": True, "data": f"data received {text}"})
                await rpc.close()

        with running("rpc_worker"):
            asyncio.run(calls())

    def test_our_rpc_client_calls_a_python_worker(self):
        queue = self.channel.queue_declare(f"python-{uuid.uuid4()}", auto_delete=True).method.queue
        client = subprocess.Popen(
            command("rpc_client", queue, "hello"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        for method, properties, body in self.channel.consume(queue, inactivity_timeout=PATIENCE):
            self.assertIsNotNone(method, "no request")
            self.assertEqual(unpack(body), {"data": "hello"})
            answer = pika.BasicProperties(correlation_id=properties.correlation_id, type="result")
            body = pack({"success": True, "data": "hello from Python"})
            self.channel.basic_publish("", properties.reply_to, body, answer)
            self.channel.basic_ack(method.delivery_tag)
            break
        self.channel.cancel()
        stdout, _ = client.communicate(timeout=PATIENCE)
        self.assertEqual((client.returncode, stdout), (0, "hello from Python\n"))

    def test_a_python_workers_error_is_told(self):
        queue = self.channel.queue_declare(f"python-{uuid.uuid4()}", auto_delete=True).method.queue
        client = subprocess.Popen(
            command("rpc_client", queue, "x"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        for method, properties, _ in self.channel.consume(queue, inactivity_timeout=PATIENCE):
            self.assertIsNotNone(method, "no request")
            error = {"type": "ValueError", "message": "not that", "args": ["not that"], "trace": "Traceback ..."}
            answer = pika.BasicProperties(correlation_id=properties.correlation_id, type="result")
            self.channel.basic_publish("", properties.reply_to, pack({"success": False, "error": error}), answer)
            self.channel.basic_ack(method.delivery_tag)
            break
        self.channel.cancel()
        _, stderr = client.communicate(timeout=PATIENCE)
        self.assertEqual(client.returncode, 1)
        self.assertIn("ValueError: not that", stderr)


if __name__ == "__main__":
    import unittest

    unittest.main()
