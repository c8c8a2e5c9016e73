package issuer

import (
	"context"
	"crypto"
	"fmt"
	"net/http/httptest"
	"sync/atomic"
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

// Clock lets a test set the clock of an issuer that does not serve yet; it then stands still.
func Clock(i *Issuer) (set func(time.Time)) {
	var clock atomic.Pointer[time.Time]
	i.now = func() time.Time {
		if t := clock.Load(); t != nil {
			return *t
		}
		return time.Now()
	}
	return func(t time.Time) { clock.Store(&t) }
}

// ShortCA has CA certificates made by Init live for d.
func ShortCA(tb testing.TB, d time.Duration) {
	old := caLifetime
	caLifetime = d
	tb.Cleanup(func() { caLifetime = old })
}

// FullDisk has every write to the inventory fail, until it is called off.
func FullDisk(tb testing.TB, i *Issuer) (end func()) {
	pragma := func(n int) {
		tb.Helper()
		if _, err := i.store.db.ExecContext(context.Background(), fmt.Sprintf("PRAGMA query_only(%d)", n)); err != nil {
			tb.Fatal(err)
		}
	}
	pragma(1)
	return func() { pragma(0) }
}

// Inventory is an inventory's file alone.
type Inventory struct{ s *store }

// OpenInventory opens or makes one.
func OpenInventory(ctx context.Context, path string) (*Inventory, error) {
	s, err := openStore(ctx, path, true)
	if err != nil {
		return nil, err
	}
	return &Inventory{s}, nil
}

// Agents lists its agents.
func (i *Inventory) Agents(ctx context.Context) ([]*Agent, error) { return i.s.agents(ctx) }

// Close closes it.
func (i *Inventory) Close() error { return i.s.db.Close() }

// Decide answers a refusal to a host.
func Decide(ctx context.Context, i *Issuer, agent string, refusal error) {
	i.decide(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "POST", "/v1/sessions", nil), party{agent: agent}, nil, refusal)
}

// Exec changes the inventory.
func Exec(tb testing.TB, i *Issuer, statement string) {
	tb.Helper()
	if _, err := i.store.db.ExecContext(context.Background(), statement); err != nil {
		tb.Fatal(err)
	}
}
