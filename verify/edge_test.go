package verify_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify"
)

// spelled signs a good statement under a protected header in another spelling.
func (v *venue) spelled(t *testing.T, change func(header string) string) string {
	t.Helper()
	p := strings.Split(v.action(t, nil), ".")
	b, err := base64.RawURLEncoding.DecodeString(p[0])
	if err != nil {
		t.Fatal(err)
	}
	input := []byte(base64.RawURLEncoding.EncodeToString([]byte(change(string(b)))) + "." + p[1])
	sig, err := jws.Sign(v.agent.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

// TestHeaderHasOneSpelling: what is signed is in canonical form, the header too.
func TestHeaderHasOneSpelling(t *testing.T) {
	v := newVenue(t)
	r := v.receiver(t)
	if _, err := r.Verify(t.Context(), []byte(v.spelled(t, func(h string) string { return h })), nil); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(string) string{
		"space": func(h string) string { return strings.Replace(h, `,"typ"`, `, "typ"`, 1) },
		"order": func(h string) string {
			return `{"typ":"agent-action+jws",` + strings.Replace(h[1:], `"typ":"agent-action+jws",`, "", 1)
		},
		"escape":          func(h string) string { return strings.Replace(h, `"ES256"`, `"\u0045S256"`, 1) },
		"escaped name":    func(h string) string { return strings.Replace(h, `"alg"`, `"\u0061lg"`, 1) },
		"line end in x5c": func(h string) string { return strings.Replace(h, `"x5c":["`, `"x5c":["\n`, 1) },
	} {
		changed := v.spelled(t, func(h string) string {
			c := change(h)
			if c == h {
				t.Fatalf("%s: %s is not changed", name, h)
			}
			return c
		})
		if _, err := r.Verify(t.Context(), []byte(changed), nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonHeader}) && !errors.Is(err, &verify.Refusal{Reason: verify.ReasonCertificate}) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRestartInMemory: what was accepted just before a restart, from a signer whose
// clock is ahead, is not accepted after it.
func TestRestartInMemory(t *testing.T) {
	v := newVenue(t)
	ahead := []byte(v.action(t, func(s *scope.Statement) { s.Time.Time = s.Time.Time.Add(1900 * time.Millisecond) }))
	if _, err := v.receiver(t).Verify(t.Context(), ahead, nil); err != nil {
		t.Fatal(err)
	}
	v.config.Replay = verify.NewMemoryStore(1000, time.Now())
	if _, err := v.receiver(t).Verify(t.Context(), ahead, nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonReplay}) {
		t.Errorf("again after a restart: %v", err)
	}
}

// TestSeenBeforeLate: an action that was accepted is known as such, however many came
// after it.
func TestSeenBeforeLate(t *testing.T) {
	for name, store := range stores(t) {
		v := newVenue(t)
		v.config.Replay = store
		r := v.receiver(t)
		first := []byte(v.action(t, nil))
		for _, compact := range [][]byte{first, []byte(v.action(t, func(s *scope.Statement) { s.Counter = 5000 }))} {
			if _, err := r.Verify(t.Context(), compact, nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.Verify(t.Context(), first, nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonReplay}) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestUnsignedHeadersAreForgotten: who has seen an action can make more headers with its
// certificate, and fills nothing with them.
func TestUnsignedHeadersAreForgotten(t *testing.T) {
	v := newVenue(t)
	r := v.receiver(t)
	good := v.action(t, nil)
	if _, err := r.Verify(t.Context(), []byte(good), nil); err != nil {
		t.Fatal(err)
	}
	p := strings.Split(good, ".")
	for range 3 {
		more := testca.New(t).Certificate
		h, err := jws.NewHeader("ES256", append(v.agent.Chain[:1:1], more), true)
		if err != nil {
			t.Fatal(err)
		}
		head, _, _ := strings.Cut(string(h.SigningInput(nil)), ".")
		if _, err := r.Verify(t.Context(), []byte(head+"."+p[1]+"."+p[2]), nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonSignature}) {
			t.Errorf("another header: %v", err)
		}
	}
	if n := r.Known(); n != 1 {
		t.Errorf("%d headers are remembered", n)
	}
}

// leaving is the context of a client that leaves while its request is looked at.
type leaving struct {
	context.Context
	asked atomic.Int32
}

func (l *leaving) Err() error {
	if l.asked.Add(1) == 1 {
		return nil
	}
	return context.Canceled
}

func (l *leaving) Done() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// TestWhoLeavesEndsNoUse: a use that was begun comes to its end.
func TestWhoLeavesEndsNoUse(t *testing.T) {
	v := newVenue(t)
	v.config.Replay = stores(t)["SQLite"]
	r := v.receiver(t)
	compact := []byte(v.action(t, nil))
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Verify(gone, compact, nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonStore}) {
		t.Errorf("a client that had left before: %v", err)
	}
	if _, err := r.Verify(&leaving{Context: t.Context()}, compact, nil); err != nil {
		t.Errorf("a client that left meanwhile: %v", err)
	}
}

// TestOCSPOfTwoCAs: an answer about one CA's certificate says nothing about another's
// that has its serial number.
func TestOCSPOfTwoCAs(t *testing.T) {
	one, two := testca.New(t), testca.New(t)
	serial := func(c *x509.Certificate) { c.SerialNumber = big.NewInt(5) }
	status := map[*testca.CA]int{one: ocsp.Good, two: ocsp.Revoked}
	var by *testca.CA
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		b, err := ocsp.CreateResponse(by.Certificate, by.Certificate, ocsp.Response{Status: status[by], SerialNumber: big.NewInt(5), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour), RevokedAt: time.Now().Add(-time.Minute)}, by.Key)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(b)
	}))
	defer srv.Close()
	o := &verify.OCSP{URL: srv.URL, MaxAge: time.Hour}
	for _, by = range []*testca.CA{one, two} {
		err := o.Check(t.Context(), by.Agent(t, "a", []byte(scopeJSON), serial).Chain[0], by.Certificate, time.Now())
		if (status[by] == ocsp.Revoked) != errors.Is(err, &verify.Refusal{Reason: verify.ReasonRevoked}) || status[by] == ocsp.Good && err != nil {
			t.Errorf("status %d: %v", status[by], err)
		}
	}
}
