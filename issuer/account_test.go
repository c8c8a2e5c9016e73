package issuer_test

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/attester"
	"inkan/internal/problem"
	"inkan/issuer"
	"inkan/journal"
	"inkan/simulator"
	"inkan/tpm"
)

// audited is a host with a TPM that testifies to its signatures, and its journal.
type audited struct {
	o    *office
	sim  *simulator.TPM
	dev  *tpm.Device
	path string
	j    *journal.Journal
	keys map[string][]byte
	key  *tpm.Key // some key, as another agent may have it
	file []byte   // of it
}

func newAudited(t *testing.T, o *office) *audited {
	t.Helper()
	h := &audited{o: o, sim: simulator.TPMForTest(t), path: filepath.Join(t.TempDir(), journal.FileName)}
	h.start(t)
	eks, err := h.dev.EKs()
	o.must(t, err)
	pin, err := attest.SPKIDigest(eks[0].Public)
	o.must(t, err)
	o.must(t, o.admin.AddDevice(t.Context(), issuer.Device{ID: "host3", EK: hex.EncodeToString(pin[:]), UnsafeClock: true}))
	values, err := h.dev.ReadPCRs(selection)
	o.must(t, err)
	p, err := attest.SignPolicy(o.policy, "swtpm", values, attest.PolicyRef("example.org"))
	o.must(t, err)
	o.must(t, o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "host3", Approved: *p}))
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "books", Device: "host3", Scope: scopeJSON}))
	return h
}

// start is what a signer does when it starts.
func (h *audited) start(t *testing.T) {
	t.Helper()
	var err error
	h.dev, err = tpm.Open(h.sim.Address)
	h.o.must(t, err)
	dev := h.dev
	t.Cleanup(func() { _ = dev.Close() })
	h.open(t)
	if h.file == nil {
		h.file, _, err = h.dev.CreateKey(tpm.SigningTemplate())
		h.o.must(t, err)
	}
	h.key, err = h.dev.LoadKey(h.file, nil)
	h.o.must(t, err)
	h.testify(t)
}

func (h *audited) open(t *testing.T) {
	t.Helper()
	j, err := journal.Open(h.path)
	h.o.must(t, err)
	t.Cleanup(func() { _ = j.Close() })
	h.o.must(t, h.dev.StartAudit(j))
	h.j = j
}

func (h *audited) testify(t *testing.T) {
	t.Helper()
	_, err := h.dev.Testify(nil)
	h.o.must(t, err)
}

func (h *audited) signs(t *testing.T, messages ...string) {
	t.Helper()
	for _, m := range messages {
		_, err := crypto.SignMessage(h.key, nil, []byte(m), crypto.SHA256)
		h.o.must(t, err)
	}
}

// behind signs as root would: beside the signer.
func (h *audited) behind(t *testing.T) {
	t.Helper()
	h.dev.Release()
	d, err := tpm.Open(h.sim.Address)
	h.o.must(t, err)
	defer d.Close()
	k, err := d.LoadKey(h.file, nil)
	h.o.must(t, err)
	_, err = crypto.SignMessage(k, nil, []byte("behind"), crypto.SHA256)
	h.o.must(t, err)
}

// renews enrols, or renews.
func (h *audited) renews(t *testing.T) error {
	t.Helper()
	_, err := attester.Run(t.Context(), h.o.agents(), h.dev, h.j, "books", h.keys, nil, func(keys map[string][]byte) error { h.keys = keys; return nil })
	return err
}

func (o *office) agents() attester.Issuer {
	return attester.Issuer{URL: "https://" + o.addresses.Agent, Roots: o.roots}
}

func (h *audited) refuses(t *testing.T, check, part string) {
	t.Helper()
	err := h.renews(t)
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Check != check || !strings.Contains(p.Detail, part) {
		t.Fatalf("%v; %s: %s is expected", err, check, part)
	}
	if e := h.event(t, "refused"); e.Check != check || e.Agent != "books" && e.Evidence == "" {
		t.Errorf("the decision log has %+v", e)
	}
}

// event returns the last event of a kind.
func (h *audited) event(t *testing.T, kind string) (last issuer.Event) {
	t.Helper()
	events, err := h.o.admin.Events(t.Context(), 0)
	h.o.must(t, err)
	for _, e := range events {
		if e.Kind == kind {
			last = e
		}
	}
	return last
}

// edit changes the journal's file, which root can.
func (h *audited) edit(t *testing.T, change func(lines [][]byte) [][]byte) {
	t.Helper()
	b, err := os.ReadFile(h.path)
	h.o.must(t, err)
	h.o.must(t, os.WriteFile(h.path, bytes.Join(change(bytes.SplitAfter(b, []byte("\n"))), nil), 0o600))
}

// TestNothingOffTheBooks: at each renewal the issuer recomputes what the TPM
// testified since the last one.
func TestNothingOffTheBooks(t *testing.T) {
	h := newAudited(t, newOffice(t))
	h.signs(t, "before the issuer knows the host")
	early := h.begin(t, "books")
	defer early.Close()
	ev, err := early.Collect(nil, nil)
	h.o.must(t, err)
	h.o.must(t, h.renews(t))
	if err := early.Finish(t.Context(), ev); err == nil || !strings.Contains(err.Error(), "C3") || !strings.Contains(err.Error(), "begin again") {
		t.Errorf("an exchange that nothing was held against: %v", err)
	}
	if e := h.event(t, "appraised"); !strings.Contains(e.Detail, "signatures audited from period") {
		t.Errorf("the first time: %+v", e)
	}
	h.o.must(t, h.renews(t))
	h.signs(t, "one", "two")
	h.testify(t)
	h.testify(t)
	h.signs(t, "three")
	h.o.must(t, h.renews(t))
	if e := h.event(t, "appraised"); !strings.Contains(e.Detail, ", 4 of them in the journal") { // and the request
		t.Errorf("an honest renewal: %+v", e)
	}
	// An evidence that does not arrive changes nothing.
	x, err := attester.Begin(t.Context(), h.o.agents(), h.dev, "books", nil)
	h.o.must(t, err)
	x.Journal = h.j
	_, err = x.Collect(h.keys, nil)
	h.o.must(t, err)
	x.Close()
	h.o.must(t, h.renews(t))
	if e := h.event(t, "unaccounted"); e.Kind != "" {
		t.Errorf("nothing was lost: %+v", e)
	}

	// More than one part.
	long := strings.Repeat("x", 4000)
	for range 210 {
		h.signs(t, long)
	}
	h.o.must(t, h.renews(t))
	if e := h.event(t, "appraised"); !strings.Contains(e.Detail, ", 211 of them in the journal") {
		t.Errorf("a long journal: %+v", e)
	}

	// A reset of the TPM, and a signer that was killed, are told.
	h.signs(t, "four")
	h.o.must(t, h.sim.Kill())
	h.o.must(t, h.sim.Restart())
	h.start(t)
	h.signs(t, "five")
	h.o.must(t, h.renews(t))
	if e := h.event(t, "unaccounted"); e.Check != "C3" || e.Device != "host3" || !strings.Contains(e.Detail, "the TPM was reset") {
		t.Errorf("a reset: %+v", e)
	}
	name, err := attest.KeyName(h.key.PublicArea())
	h.o.must(t, err)
	done, err := h.j.Begin(name, [32]byte{}, nil)
	h.o.must(t, err)
	h.o.must(t, done(nil, nil))
	h.behind(t)
	h.o.must(t, h.renews(t))
	if e := h.event(t, "unaccounted"); !strings.Contains(e.Detail, "killed while the TPM signed") {
		t.Errorf("a kill: %+v", e)
	}
	h.o.must(t, h.renews(t))
	res, err := http.Get("http://" + h.o.addresses.Metrics + "/metrics")
	h.o.must(t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	h.o.must(t, err)
	if !strings.Contains(string(text), "\ninkan_issuer_unaccounted_total 2\n") {
		t.Errorf("the metrics: %s", text)
	}
}

// TestOffTheBooks: a renewal is refused where the TPM signed what is not in the
// journal, until an operator looks at it.
func TestOffTheBooks(t *testing.T) {
	o := newOffice(t)
	h := newAudited(t, o)
	h.o.must(t, h.renews(t))
	reset := func() {
		t.Helper()
		o.must(t, o.admin.ResetAudit(t.Context(), "host3"))
		o.must(t, h.renews(t))
	}

	h.signs(t, "one")
	h.behind(t)
	h.refuses(t, "C3", "off_the_books")
	h.refuses(t, "C3", "off_the_books") // it does not go away
	reset()
	h.behind(t)
	h.testify(t)
	h.signs(t, "later")
	h.refuses(t, "C3", "off_the_books")
	reset()

	h.signs(t, "two", "three")
	h.edit(t, func(l [][]byte) [][]byte { return append(l[:len(l)-3], l[len(l)-1]) })
	h.refuses(t, "C3", "off_the_books")
	reset()
	h.signs(t, "four")
	h.testify(t)
	h.signs(t, "five")
	h.edit(t, func(l [][]byte) [][]byte { return append(l[:len(l)-6], l[len(l)-3:]...) }) // a whole period
	h.refuses(t, "C3", "audit_taken")
	reset()
	h.signs(t, "six")
	h.edit(t, func(l [][]byte) [][]byte { l[len(l)-3] = []byte("{}\n"); return l })
	h.refuses(t, "C3", "(journal)")
	reset()
	h.o.must(t, os.Rename(h.path, h.path+".old"))
	h.open(t)
	h.testify(t)
	h.refuses(t, "C3", "moved away or cut off")
	reset()

	if err := o.admin.ResetAudit(t.Context(), "host9"); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("another device: %v", err)
	}
	if e := h.event(t, "changed"); e.Device != "host3" || !strings.Contains(e.Detail, "is forgotten") {
		t.Errorf("a reset of the audit: %+v", e)
	}

	// Parts that do not belong.
	for name, c := range map[string]struct {
		check, part string
		lines       func(from, to [32]byte) []byte
	}{
		"not from the testimony on record": {"C3", "does not begin with", func(_, to [32]byte) []byte { return h.between(t, to, to) }},
		"not to the testimony of now":      {"C3", "does not end with", func(from, _ [32]byte) []byte { return h.between(t, from, from) }},
		"too long":                         {"G7", "parts of at most", func(_, _ [32]byte) []byte { return make([]byte, journal.MaxPart+1) }},
		"nothing":                          {"C3", "did not come", func(_, _ [32]byte) []byte { return nil }},
	} {
		x := h.begin(t, "books")
		ev, err := x.Collect(h.keys, nil)
		o.must(t, err)
		err = x.Part(t.Context(), c.lines([32]byte(x.Challenge.Testimony), journal.TestimonyID(ev.Audit.Attest)))
		if err == nil {
			err = x.Finish(t.Context(), ev)
		}
		x.Close()
		if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Check != c.check || !strings.Contains(p.Detail, c.part) {
			t.Errorf("%s: %v", name, err)
		}
	}
	x := h.begin(t, "books")
	if err := x.Part(t.Context(), []byte("{}\n")); err == nil {
		t.Error("a part that is none was taken")
	}
	if err := x.Part(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "Q3") {
		t.Errorf("a failed exchange goes on: %v", err)
	}
	x.Close()
	h.o.must(t, h.renews(t))

	// A testimony that stops coming.
	plain, err := tpm.Open(h.sim.Address)
	o.must(t, err)
	defer plain.Close()
	h.dev.Release()
	h.dev, h.j = plain, nil
	h.refuses(t, "C1", "reset-audit")
	reset()
	h.o.must(t, h.renews(t))
	x = h.begin(t, "books")
	defer x.Close()
	if err := x.Part(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "not asked for") {
		t.Errorf("a journal that was not asked for: %v", err)
	}
}

func (h *audited) begin(t *testing.T, agent string) *attester.Exchange {
	t.Helper()
	x, err := attester.Begin(t.Context(), h.o.agents(), h.dev, agent, nil)
	h.o.must(t, err)
	return x
}

func (h *audited) between(t *testing.T, from, to [32]byte) (out []byte) {
	t.Helper()
	h.o.must(t, h.j.Between(from, to, func(lines []byte) error { out = append(out, lines...); return nil }))
	return out
}
