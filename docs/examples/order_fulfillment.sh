#!/bin/sh
# Fulfils an order, as a shell script whose steps survive crashes. Needs jq.
#
#     absurd worker --exec docs/examples/order_fulfillment.sh --task-name order-fulfillment
#     absurd task spawn order-fulfillment '{"order_id":"42","amount":100,"items":["widget"],"email":"a@example.com"}'
#     absurd event emit shipment.packed:42 '{"tracking_number":"TRACK-42"}'
#
# It runs from its beginning each time: what a step has stored comes back without the step's command running again. While it
# waits for the event it does not run at all.
set -eu

# What the payment provider does, as a command of its own: `order_fulfillment.sh charge ORDER AMOUNT`.
if [ "${1:-}" = charge ]; then
  echo "charging $3" >&2
  exec jq -cn --arg id "pay-$2" --argjson amount "$3" '{$id, $amount}'
fi

field() { printf %s "$1" | jq -er ".$2" || { echo "no $2 in $1" >&2; exit 1; }; }

# Each value gets a line of its own: `set -e` does not see a failure inside of another command's arguments.
order=$(cat)
order_id=$(field "$order" order_id)
amount=$(field "$order" amount)
items=$(field "$order" 'items | join(",")')
email=$(field "$order" email)

payment=$(absurd step process-payment -- "$0" charge "$order_id" "$amount")
absurd step reserve-inventory -- echo "reserved $items" >&2
shipment=$(absurd await-event "shipment.packed:$order_id")
tracking_number=$(field "$shipment" tracking_number)
absurd step send-notification -- echo "to $email: $tracking_number" >&2
jq -cn --argjson payment "$payment" --argjson shipment "$shipment" \
  '{order_id: $payment.id, tracking_number: $shipment.tracking_number}'
