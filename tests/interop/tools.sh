#!/usr/bin/env bash
# The tools of rabbitmq-c (Debian's amqp-tools) against the broker at AMQP_URL.
set -euo pipefail

url=("--url=$AMQP_URL")
queue=interop-tools-$$
count=0
trap 'amqp-delete-queue "${url[@]}" -q "$queue" >/dev/null' EXIT

is() {
    if [ "$2" != "$3" ]; then
        echo "tools.sh: $1: expected $(printf %q "$3"), got $(printf %q "$2")" >&2
        exit 1
    fi
    count=$((count + 1))
}

has() {
    if [[ $2 == *"$3"* ]]; then is "$1" found found; else is "$1" "$2" "$3"; fi
}

# amqp-publish does not wait until its message is in the queue.
get() {
    local deadline=$((SECONDS + 20))
    until amqp-get "${url[@]}" -q "$queue"; do
        [ $SECONDS -lt $deadline ] || return 1
    done
}

is "declare" "$(amqp-declare-queue "${url[@]}" -q "$queue")" "$queue"
is "declare again" "$(amqp-declare-queue "${url[@]}" -q "$queue")" "$queue"
is "get from an empty queue" "$(amqp-get "${url[@]}" -q "$queue" && echo something || echo nothing)" nothing

amqp-publish "${url[@]}" -r "$queue" -C text/plain -E gzip -H "key: value" -p -b "one body"
is "get" "$(get)" "one body"
head -c 300000 /dev/zero | tr '\0' x | amqp-publish "${url[@]}" -r "$queue"
is "get of several frames" "$(get | wc -c)" 300000
amqp-publish "${url[@]}" -r "$queue" -b ""
is "get of an empty body" "$(get)" ""

printf 'first\nsecond\nthird\n' | amqp-publish "${url[@]}" -r "$queue" -l
is "consume" "$(timeout 30 amqp-consume "${url[@]}" -q "$queue" -c 2 cat)" $'first\nsecond'
# What the command does not want is not acknowledged, and is there again when the consumer is gone.
timeout 30 amqp-consume "${url[@]}" -q "$queue" -c 1 -p 1 false || true
is "get what came back" "$(get)" "third"

amqp-publish "${url[@]}" -r "$queue" -b "left"
is "no-ack consume" "$(timeout 30 amqp-consume "${url[@]}" -q "$queue" -A -c 1 cat)" left
timeout 30 amqp-consume "${url[@]}" -e amq.topic -r "$queue.#" -c 1 cat >"${TMPDIR:-/tmp}/$queue" &
consumer=$!
# Its queue is bound when the broker takes what is published for it; until then there is nowhere for it to go.
while kill -0 $consumer 2>/dev/null; do
    amqp-publish "${url[@]}" -e amq.topic -r "$queue.key" -b "by topic"
done
wait $consumer
is "consume from an exchange" "$(cat "${TMPDIR:-/tmp}/$queue"; rm "${TMPDIR:-/tmp}/$queue")" "by topic"

amqp-publish "${url[@]}" -r "$queue" -b "deleted"
refused=$(amqp-delete-queue "${url[@]}" -q "$queue" -e 2>&1 || true)
has "delete if empty" "$refused" "PRECONDITION_FAILED - queue '$queue' in vhost '/' not empty"
is "delete" "$(amqp-delete-queue "${url[@]}" -q "$queue")" 1
refused=$(amqp-get "${url[@]}" -q "$queue" 2>&1 || true)
has "get from what is gone" "$refused" "NOT_FOUND - no queue '$queue' in vhost '/'"
wrong=$(amqp-get --url="${AMQP_URL/guest:guest/guest:wrong}" -q "$queue" 2>&1 || true)
has "a wrong password" "$wrong" "ACCESS_REFUSED"

echo "tools.sh: $count checks passed"
