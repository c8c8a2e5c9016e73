package signer_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// brokenDevice has a key and does not sign.
type brokenDevice struct{ crypto.Signer }

var errInside = errors.New("planted: /usr/lib/module.so in slot 7: CKR_DEVICE_ERROR")

func (brokenDevice) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errInside }

// TestInsideStaysInside: what the device said is in the signer's log, and not in
// the answer.
func TestInsideStaysInside(t *testing.T) {
	self, _ := executables(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	d := startWith(t, agent("a", self), nil, map[string]*testca.Agent{"a": {Key: brokenDevice{key}}})
	c := client.New(d.socket)
	_, action := c.SignJSON(context.Background(), order(client.NewID()))
	head := c.Post(context.Background(), "/v1/checkpoint", struct{}{}, new(struct{}))
	for what, err := range map[string]error{"an action": action, "the record's head": head} {
		p, ok := errors.AsType[*problem.Problem](err)
		if !ok || scope.Rule(p.Rule) != signer.RuleDevice || strings.Contains(fmt.Sprint(p), "planted") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := strings.Count(d.log.String(), "planted"); n != 2 {
		t.Errorf("the log names the cause %d times: %s", n, d.log)
	}
}
