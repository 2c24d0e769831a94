// Package outbox delivers messages that a service wrote in the same database
// transaction as its own data: if the transaction commits, every message is
// delivered; if it does not, none is.
//
// A writer appends messages inside its transaction (outboxpg.Append). A [Relay]
// reads them and hands them to a [Publisher], such as outboxkafka's. Any number
// of relays may run; they share the lanes and take over from one another.
//
// # Guarantees
//
//   - At least once: a committed message is delivered, whatever is killed.
//     A message is repeated only after a crash, a lost reply or a change of
//     owner, and at most two batches of each lane are. Consumers drop repeats by
//     [Message.ID] (outboxpg.Inbox).
//   - Order: the first deliveries of one key's messages are in the order of
//     their Append calls, also when transactions overlap and commit in another
//     order.
//   - Isolation: a message that cannot be delivered holds up only its own key,
//     and after [RelayOptions].MaxAttempts goes to the dead letters, from which
//     it can be replayed.
//   - No stall: a transaction that has not appended anything never delays
//     delivery, however long it stays open. One that has appended delays the
//     lanes it appended to until it ends.
//
// # What happens when
//
//	writer dies before COMMIT    nothing was written, nothing is delivered
//	relay dies                   another takes its lanes when the lease ends and
//	                             repeats what was not yet recorded as delivered
//	relay is paused, then wakes  its records of outcome are refused by the fence
//	broker is down               records stay where they are; memory is bounded by
//	                             two batches; attempts are not counted
//	database restarts            the relay reconnects and reads its cursors anew
//
// The pattern is described as "Transactional outbox" in Chris Richardson,
// Microservices Patterns (2018), section 3.3.
package outbox
