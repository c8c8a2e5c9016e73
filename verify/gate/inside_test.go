package gate

import (
	"context"
	"crypto/x509"
	"errors"
	"net/url"
	"testing"
	"time"

	"inkan/verify"
)

// TestPeerBoundAlone: a receiver that is used without the gate's handler
// accepts nothing.
func TestPeerBoundAlone(t *testing.T) {
	ctx := context.WithValue(t.Context(), exchangeKey{}, &exchange{})
	for _, ctx := range []context.Context{t.Context(), ctx} {
		if err := (peerBound{verify.NoRevocation{}}).Check(ctx, &x509.Certificate{}, nil, time.Now()); !errors.Is(err, &verify.Refusal{Reason: ReasonPeer}) {
			t.Errorf("got %v", err)
		}
	}
}

// TestReasons: each reason of this package has its line and its status.
func TestReasons(t *testing.T) {
	for _, r := range []verify.Reason{ReasonClient, ReasonAgent, ReasonNetwork, ReasonPeer, ReasonRecord, ReasonBackend} {
		if status(r) == 500 {
			t.Errorf("%s has no status", r)
		}
	}
	for _, r := range verify.Reasons {
		for _, mine := range Reasons {
			if r.Reason == mine.Reason {
				t.Errorf("%s means two things", r.Reason)
			}
		}
	}
}

// FuzzID: a SPIFFE ID that passes is of the trust domain for another parser as well.
func FuzzID(f *testing.F) {
	for _, s := range []string{"spiffe://example.org/agent/a", "spiffe://example.org", "spiffe://example.org/", "spiffe://example.org@evil/a", "spiffe://example.org/../a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if validID(s, "example.org") != nil {
			return
		}
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "spiffe" || u.Host != "example.org" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path == "" || u.String() != s {
			t.Errorf("%q passes and parses to %+v, %v", s, u, err)
		}
	})
}
