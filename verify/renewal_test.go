package verify_test

import (
	"context"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify"
)

// lists are the two that a receiver gets again and again, over a source that a
// test changes.
func lists(t *testing.T, v *venue, load func(ctx context.Context, good []byte) ([]byte, error)) map[string]func(ctx context.Context, issuer *x509.Certificate, now time.Time) error {
	t.Helper()
	now := time.Now().UTC().Truncate(time.Second)
	der, err := v.crl(t, time.Hour).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kills, err := (&scope.KillList{Number: 1, ThisUpdate: now, NextUpdate: now.Add(time.Hour), Kills: []scope.IssuedKill{}}).Sign(v.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	crl := &verify.CRL{MaxAge: time.Hour, Reload: time.Minute, Load: func(ctx context.Context) ([]byte, error) { return load(ctx, der) }}
	list := &verify.KillList{MaxAge: time.Hour, Reload: time.Minute, Load: func(ctx context.Context) ([]byte, error) { return load(ctx, []byte(kills)) }}
	return map[string]func(context.Context, *x509.Certificate, time.Time) error{
		"CRL": func(ctx context.Context, issuer *x509.Certificate, now time.Time) error {
			return crl.Check(ctx, v.agent.Chain[0], issuer, now)
		},
		"kill list": func(ctx context.Context, issuer *x509.Certificate, now time.Time) error {
			return list.Check(ctx, v.agent.ID, "XPAR", issuer, now)
		},
	}
}

// TestWhoLeavesEndsNoRenewal: a client that goes away while its request has a list
// got again keeps the list from nobody.
func TestWhoLeavesEndsNoRenewal(t *testing.T) {
	v := newVenue(t)
	for name, check := range lists(t, v, func(ctx context.Context, good []byte) ([]byte, error) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
			return good, nil
		}
	}) {
		ctx, leave := context.WithTimeout(t.Context(), 20*time.Millisecond)
		now := time.Now()
		if err := check(ctx, v.ca.Certificate, now); err == nil {
			t.Errorf("%s: there was one before it was got", name)
		}
		leave()
		if err := check(t.Context(), v.ca.Certificate, now); err != nil {
			t.Errorf("%s: after a client left: %v", name, err)
		}
	}
}

// TestHangingSource: a source that does not answer holds nobody up while the list
// that is there is good.
func TestHangingSource(t *testing.T) {
	v := newVenue(t)
	hang := make(chan struct{})
	var hanging atomic.Bool
	for name, check := range lists(t, v, func(_ context.Context, good []byte) ([]byte, error) {
		if hanging.Load() {
			<-hang
		}
		return good, nil
	}) {
		hanging.Store(false)
		now := time.Now()
		if err := check(t.Context(), v.ca.Certificate, now); err != nil {
			t.Fatal(err)
		}
		hanging.Store(true)
		done := make(chan error)
		for range 10 {
			go func() { done <- check(t.Context(), v.ca.Certificate, now.Add(2*time.Minute)) }()
		}
		timeout := time.After(5 * time.Second)
		for range 10 {
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			case <-timeout:
				t.Fatalf("%s: requests wait for a source that hangs", name)
			}
		}
	}
	close(hang)
}

// TestListOfAnotherCA: a list says nothing of another CA's certificates, and who has
// one of those keeps it from nobody else.
func TestListOfAnotherCA(t *testing.T) {
	v, other := newVenue(t), testca.New(t)
	for name, check := range lists(t, v, func(_ context.Context, good []byte) ([]byte, error) { return good, nil }) {
		now := time.Now()
		if err := check(t.Context(), v.ca.Certificate, now); err != nil {
			t.Fatal(err)
		}
		for _, at := range []time.Time{now, now.Add(2 * time.Minute)} {
			if err := check(t.Context(), other.Certificate, at); err == nil || errors.Is(err, &verify.Refusal{}) {
				t.Errorf("%s: of another CA's agent: %v", name, err)
			}
		}
		if err := check(t.Context(), v.ca.Certificate, now.Add(2*time.Minute)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
