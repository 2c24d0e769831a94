// Package lock lets one at a time change a thing, among many processes: by the
// version of what is changed, or by a lease on its name.
//
// Optimistic: an [Updater] reads, changes, and stores what still has the version
// that was read. Nothing is held, so nothing is lost in a crash; use it wherever
// the thing is one value. [ConflictError] tells those who write by hand what they
// have missed.
//
// Leases: a [Locker] takes keys for a time, extends that while the process lives,
// and tells the holder in time when it cannot. Use it for work that touches more
// than one value or something outside. Stores are lockpg, lockredis and
// [MemoryStore].
//
// # Guarantees
//
//   - One holder: a [Store] grants a key to one owner at a time, by its own clock.
//     lockredis forgets leases when its server fails over; lockpg does not.
//   - Told in time: the context of a lease ends before the store can give the key
//     to another, by the monotonic clock and from before each request was sent.
//   - No late write: a process that was stopped does not notice in time. What it
//     writes after that is refused in a transaction with lockpg.Guard, and by
//     whoever compares [Lease.Token], which rises each time a key changes hands.
//   - No stuck key: a lease ends [Options].TTL after its holder has died.
//   - Order: within a Locker, a key goes to those who want it in the order in which
//     they asked. Among processes there is no order; those who wait are told when
//     a key is released, and ask by themselves now and then.
//   - No lost update: an Updater never overwrites a version that its changes were
//     not made of.
//
// # What happens when
//
//	holder dies                        the key is free when its lease ends
//	holder stops, then goes on         its context ends; Guard refuses its writes
//	store does not answer              leases are extended again until they end; then their contexts do
//	another takes over                 the former holder can neither extend nor release
//	a request's reply is lost          it may be repeated, and is one
//	a notification is lost             whoever waits asks by itself within Options.Poll
//	work outlives its transaction      Guard keeps the key until the transaction ends
//	a change conflicts                 it is made again on the new value, after a pause
//	process dies in an Update          the change was stored or not; the version tells
//	Redis fails over                   two may hold a key, and tokens may be lower than before
//
// The holder's side is after Kleppmann, "How to do distributed locking" (2016);
// the Updater after Hendler et al., "Flat Combining" (2010).
package lock
