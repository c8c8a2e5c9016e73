package issuer_test

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/issuer"
	"inkan/scope"
)

// TestWhoDidIt: the decision log says which administrator changed something.
func TestWhoDidIt(t *testing.T) {
	o := newOffice(t)
	key := newKey(t)
	crt, err := o.issuer.CertifyAdministrator(t.Context(), "alice", &key.PublicKey)
	o.must(t, err)
	block, _ := pem.Decode(crt)
	alice := issuer.NewClient("https://"+o.addresses.Admin, o.ca, tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key})
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	for what, do := range map[string]func(*issuer.Client) error{
		"agent is suspended": func(c *issuer.Client) error { return c.SetStatus(t.Context(), "a", issuer.Suspended) },
		"policy good":        func(c *issuer.Client) error { return c.RetirePolicy(t.Context(), "good") },
		"venue XPAR: halted": func(c *issuer.Client) error {
			_, err := c.Kill(t.Context(), issuer.KillOrder{Scope: scope.KillVenue, Venue: "XPAR", Reason: "halted"})
			return err
		},
		"keyCompromise": func(c *issuer.Client) error {
			return c.Revoke(t.Context(), leaf(t, g, 1).SerialNumber.Text(16), "keyCompromise")
		},
	} {
		o.must(t, do(alice))
		events, err := o.admin.Events(t.Context(), 0)
		o.must(t, err)
		if last := events[len(events)-1]; !strings.Contains(last.Detail, what) || !strings.HasSuffix(last.Detail, ", by alice") {
			t.Errorf("%s: %+v", what, last)
		}
	}
	if _, err := o.enrol(t, o.dev, "a"); err == nil {
		t.Error("a suspended agent was certified")
	}
	events, err := o.admin.Events(t.Context(), 0)
	o.must(t, err)
	if last := events[len(events)-1]; strings.Contains(last.Detail, ", by") {
		t.Errorf("a host's exchange is an administrator's: %+v", last)
	}
}

// TestRefusalsAreCounted: also those that are not in the decision log.
func TestRefusalsAreCounted(t *testing.T) {
	o := newOffice(t)
	g, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	for range 70 {
		_, _ = o.enrol(t, o.dev, "nobody")
	}
	if _, err := issuer.NewClient("https://"+o.addresses.Admin, o.ca, tls.Certificate{Certificate: g.Certificates[1].Chain, PrivateKey: o.dev.Keys["tls"]}).Devices(t.Context()); err == nil {
		t.Error("an agent is an administrator")
	}
	res, err := http.Get("http://" + o.addresses.Metrics + "/metrics")
	o.must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	o.must(t, err)
	for _, want := range []string{`inkan_issuer_refusals_total{check="G7"}`, `inkan_issuer_refusals_total{check="G3"} 1`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is missing", want)
		}
	}
}

// TestRefusalOfWhoLeft: a host that hangs up is in the decision log all the same.
func TestRefusalOfWhoLeft(t *testing.T) {
	o := newOffice(t)
	gone, leave := context.WithCancel(t.Context())
	leave()
	issuer.Decide(gone, o.issuer, "a", &attest.Refusal{Check: "K3", Detail: "gone"})
	events, err := o.admin.Events(t.Context(), 0)
	o.must(t, err)
	if last := events[len(events)-1]; last.Check != "K3" {
		t.Errorf("the log ends with %+v", last)
	}
}

// TestInventoryOfAnotherProgram: one that lacks what this program asks of it is
// refused when it is opened, not at the first agent.
func TestInventoryOfAnotherProgram(t *testing.T) {
	o := newOffice(t)
	issuer.Exec(t, o.issuer, "ALTER TABLE device DROP COLUMN unattested")
	if i, err := o.again(); err == nil || !strings.Contains(err.Error(), "unattested") {
		t.Errorf("it was opened: %v", err)
		if i != nil {
			_ = i.Close()
		}
	}
}

// TestInventoryIsGone: an empty inventory would make what was revoked good again,
// so only Init makes one.
func TestInventoryIsGone(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"removed":   os.Remove,
		"empty":     func(path string) error { return os.Truncate(path, 0) },
		"no SQLite": func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("x", 4096)), 0o600) },
	} {
		o := newOffice(t)
		elsewhere := filepath.Join(t.TempDir(), "issuer")
		o.must(t, os.CopyFS(elsewhere, os.DirFS(o.dir)))
		path := filepath.Join(elsewhere, "inventory.db")
		for _, more := range []string{"-wal", "-shm"} {
			o.must(t, os.RemoveAll(path+more))
		}
		o.must(t, spoil(path))
		if i, err := o.open(elsewhere); err == nil || !strings.Contains(err.Error(), "inventory") {
			t.Errorf("%s: it was opened: %v", name, err)
			if i != nil {
				_ = i.Close()
			}
		}
		if fi, err := os.Stat(path); name == "removed" && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a new one was made: %v, %v", name, fi, err)
		}
	}
}

// TestRefusalsNameTheHost: the decision log says which agent and device were
// refused, at every step of an exchange.
func TestRefusalsNameTheHost(t *testing.T) {
	o := newOffice(t)
	last := func() issuer.Event {
		t.Helper()
		events, err := o.admin.Events(t.Context(), 0)
		o.must(t, err)
		return events[len(events)-1]
	}
	o.dev.PCRs[7] = make([]byte, 32)
	if _, err := o.enrol(t, o.dev, "a"); err == nil {
		t.Fatal("another state was accepted")
	}
	if e := last(); e.Check != "P1" || e.Agent != "a" || e.Device != "host1" {
		t.Errorf("evidence: %+v", e)
	}
	x := o.begin(t)
	defer x.channel.Close()
	if err := x.channel.PostLines(t.Context(), fmt.Sprintf("/v1/sessions/%x/journal", x.challenge.Session), []byte("{}\n")); err == nil {
		t.Fatal("a journal that was not asked for")
	}
	if e := last(); e.Check != "C3" || e.Agent != "a" || e.Device != "host1" {
		t.Errorf("journal: %+v", e)
	}
	if _, err := o.enrol(t, o.dev, "nobody"); err == nil {
		t.Fatal("nobody was certified")
	}
	if e := last(); e.Check != "E9" || e.Agent != "nobody" || e.Device != "host1" {
		t.Errorf("hello: %+v", e)
	}
}
