package issuer

import "testing"

// Unlimited lifts the limit of requests of one address for a benchmark.
func Unlimited(tb testing.TB) {
	old := unlimited
	unlimited = true
	tb.Cleanup(func() { unlimited = old })
}
