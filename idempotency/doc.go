// Package idempotency runs an operation once.
package idempotency
