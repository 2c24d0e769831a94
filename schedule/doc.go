// Package schedule runs work at its times, once, on whichever instance of a
// service is there.
//
// A [Definition] says when to run what; it is kept in a store and may be made,
// changed, paused, triggered and removed by any process at any time. A [Runner]
// in each instance has the handlers. Stores are schedulepg and [MemoryStore].
// schedulepg.HandleTx makes the work and the record that it is done one
// transaction.
//
// # Guarantees
//
//   - One row for a tick: each tick of a schedule becomes one row of the history,
//     and whoever makes it runs it. There is no leader whose death stops
//     anything, and no lock whose expiry lets a tick run twice.
//   - None is left out: the next tick is kept in the store, so a restart, a
//     deployment or an outage loses none silently. What comes late, by more than
//     the definition's Grace, is missed, and [Misfire] says what becomes of it.
//   - At least once: a run whose instance died is repeated by another when its
//     lease ends, at most five times; or at most once, by option.
//   - Exactly once, with schedulepg.HandleTx, for effects in the transaction.
//   - No overlap, unless it is allowed: of one schedule, the store gives out one
//     run at a time. What its owner still does after its lease has ended, no
//     store can know; its context has ended before.
//   - The clock is the store's. That of an instance may be wrong by any amount.
//
// # What happens when
//
//	an instance dies                 others run its schedules at once, and repeat
//	                                 its runs when their leases end
//	an instance is paused, wakes     its outcomes are refused by the fence
//	all instances are down           the misfire policy decides about what is missed
//	all instances are full           likewise, after the definition's Grace
//	an instance lacks a handler      it leaves the schedule to those that have it
//	a handler panics                 that attempt has failed; nothing else is disturbed
//	a handler never ends             its schedule runs no more, unless overlap is
//	                                 allowed; the others go on
//	a definition cannot be read      it is logged; the others go on
//	a schedule is defined again      nothing, if it is the same
//	clocks are changed for summer    see [Parse]
//	the store fails                  it is asked again; running work goes on until
//	                                 just before its lease ends
//	an instance is told to stop      its runs end, or are given back
//
// # Lateness
//
// An instance sleeps until the next tick, by its monotonic clock and what the
// store said its own to be. A tick is claimed in one round trip with one commit,
// and then its handler is called.
package schedule
