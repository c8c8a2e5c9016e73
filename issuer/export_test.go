package issuer

import (
	"context"
	"crypto"
	"testing"
	"time"
)

// Unlimited lifts the limit of requests of one address for a benchmark.
func Unlimited(tb testing.TB) {
	old := unlimited
	unlimited = true
	tb.Cleanup(func() { unlimited = old })
}

// Late decides to certify a TLS key of an agent now, and returns what issues.
func Late(ctx context.Context, i *Issuer, agent string, key crypto.PublicKey) func() error {
	a, err := i.store.agent(ctx, agent)
	return func() error {
		if err == nil {
			_, err = i.issue(ctx, order{profile: profileTLS, key: key, agent: a, lifetime: time.Hour})
		}
		return err
	}
}

// Limiter returns what bounds the exchanges of an address.
func Limiter() func(remote string) bool {
	l := limiter{rate: perAddressRate, burst: perAddressBurst}
	return l.allow
}
