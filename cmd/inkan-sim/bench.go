package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"inkan/attest"
	"inkan/audit"
	"inkan/internal/forge"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
	"inkan/verify"
)

// measurement is one line of the table.
type measurement struct {
	Name      string        `json:"name"`
	Clients   int           `json:"clients"`
	P50       time.Duration `json:"p50_ns"`
	P99       time.Duration `json:"p99_ns"`
	PerSecond float64       `json:"per_second"`
	Beside    string        `json:"beside,omitempty"` // what the ratio is to
	Ratio     float64       `json:"ratio,omitempty"`  // of the medians
}

// measure runs f from several clients for a while. The first call of each is
// not counted.
func measure(name string, clients int, d time.Duration, f func(client int) error) (measurement, error) {
	var mu sync.Mutex
	var all []time.Duration
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for c := range clients {
		if err := f(c); err != nil {
			return measurement{}, fmt.Errorf("%s: %w", name, err)
		}
	}
	begun := time.Now()
	for c := range clients {
		wg.Go(func() {
			var own []time.Duration
			for time.Since(begun) < d && failed.Load() == nil {
				t := time.Now()
				if err := f(c); err != nil {
					failed.Store(&err)
					break
				}
				own = append(own, time.Since(t))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, own...)
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return measurement{}, fmt.Errorf("%s: %w", name, *err)
	}
	took := time.Since(begun)
	slices.Sort(all)
	return measurement{Name: name, Clients: clients, P50: all[len(all)/2], P99: all[len(all)*99/100], PerSecond: float64(len(all)) / took.Seconds()}, nil
}

// bench collects measurements.
type bench struct {
	d    time.Duration
	rows []measurement
	out  io.Writer

	inkan string   // the command under test
	notes []string // lines below the table

	raw, policy, alone, wire, check, commit *measurement // the parts of one signed action
}

func (b *bench) run(name string, clients int, beside *measurement, f func(int) error) (*measurement, error) {
	m, err := measure(name, clients, b.d, f)
	if err != nil {
		return nil, err
	}
	if beside != nil {
		m.Beside, m.Ratio = beside.Name, float64(m.P50)/float64(beside.P50)
	}
	b.rows = append(b.rows, m)
	return &m, nil
}

// sections are what can be measured, in the order of the table. One with a world
// or tools of its own has a file of its own: bench_NAME.go.
var sections = []section{
	{"action", "a signed action, the key in swtpm, beside TPM2_Sign", (*bench).action},
	{"approver", "a signed action in local mode and in approver mode, an approver over loopback, and the TPM commands of each", (*bench).approver},
	{"verify", "a receiver beside ecdsa.Verify", (*bench).verify},
	{"record", "the durable record alone", (*bench).record},
	{"appraise", "the appraisal of evidence alone", (*bench).appraise},
	{"token", "a signed action, the key in SoftHSM, beside C_Sign", (*bench).token},
	{"wire", "the proxy, its key in swtpm and in SoftHSM; what the gate adds to a request and inkan run to a start", (*bench).wires},
	{"slow-token", "a token of 5 ms a signature, as a cloud's is", (*bench).slowToken},
}

// section is a part of the table.
type section struct {
	name  string
	about string
	run   func(b *bench, ctx context.Context) error
}

func sectionNames() string {
	var names []string
	for _, s := range sections {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// runBench measures the sections that only names, or all.
func runBench(ctx context.Context, out io.Writer, inkan string, d time.Duration, only []string, asJSON bool) error {
	for _, n := range only {
		if !slices.ContainsFunc(sections, func(s section) bool { return s.name == n }) {
			return fmt.Errorf("--only %s: there are %s", n, sectionNames())
		}
	}
	b := &bench{d: d, out: out, inkan: inkan}
	for _, s := range sections {
		if len(only) > 0 && !slices.Contains(only, s.name) {
			continue
		}
		if err := s.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	b.explain()
	if asJSON {
		return printJSON(out, map[string]any{"cores": runtime.NumCPU(), "seconds": d.Seconds(), "rows": b.rows, "notes": b.notes})
	}
	tw := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(out, "%d cores, swtpm, every measurement for %s\n", runtime.NumCPU(), d)
	fmt.Fprintln(tw, "what\tclients\tp50\tp99\tper second\tmedian is\t")
	for _, m := range b.rows {
		ratio := ""
		if m.Beside != "" {
			ratio = fmt.Sprintf("%.2f x %s", m.Ratio, m.Beside)
		}
		fmt.Fprintf(tw, "%s\t%d\t%s\t%s\t%.0f\t%s\t\n", m.Name, m.Clients, m.P50.Round(time.Microsecond), m.P99.Round(time.Microsecond), m.PerSecond, ratio)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, n := range b.notes {
		fmt.Fprintln(out, n)
	}
	return nil
}

// explain says where the time of a signed action goes, if its parts were measured.
func (b *bench) explain() {
	if b.alone == nil || b.check == nil || b.commit == nil {
		return
	}
	rest := b.alone.P50 - b.policy.P50 - b.commit.P50 - b.check.P50 - b.wire.P50
	b.notes = append(b.notes, fmt.Sprintf("Of a signed action's %s alone: the TPM %s (of which its policy %s), the durable record %s, checking the signature %s,\nHTTP and JSON %s, and %s for identifying the caller, parsing, the scope and waiting between them.",
		b.alone.P50.Round(time.Microsecond), b.policy.P50.Round(time.Microsecond), (b.policy.P50-b.raw.P50).Round(time.Microsecond), b.commit.P50.Round(time.Microsecond), b.check.P50.Round(time.Microsecond), b.wire.P50.Round(time.Microsecond), rest.Round(time.Microsecond)))
}

// action measures a signer whose key is in swtpm beside the TPM itself.
func (b *bench) action(ctx context.Context) error {
	w, err := newWorld(b.out, b.inkan, true)
	if err != nil {
		return err
	}
	defer w.end()
	me, err := os.Executable()
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if b.raw, err = b.rawTPM(ctx, w); err != nil {
		return err
	}
	if err := w.startSigner(); err != nil {
		return err
	}
	return b.signer(ctx, w, b.raw)
}

func (b *bench) rawTPM(ctx context.Context, w *world) (*measurement, error) {
	if _, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml")); err != nil {
		return nil, err
	}
	d, err := tpm.Open(w.tpm.Address)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	file, _, err := d.CreateKey(tpm.SigningTemplate())
	if err != nil {
		return nil, err
	}
	k, err := d.LoadKey(file, nil)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte("raw"))
	raw, err := b.run("TPM2_Sign, raw", 1, nil, func(int) error {
		_, err := k.Sign(nil, digest[:], crypto.SHA256)
		return err
	})
	if err != nil {
		return nil, err
	}
	// The agent's own key: PolicyPCR and PolicyAuthorize before each signature.
	state, err := signer.OpenState(w.path("state"), "mm-07")
	if err != nil {
		return nil, err
	}
	keys, err := state.Keys(attest.PurposeAction)
	if err != nil {
		return nil, err
	}
	var policies tpm.Policies
	if ok, err := state.Policies(&policies); err != nil || !ok {
		return nil, fmt.Errorf("the agent's policies cannot be read: %w", err)
	}
	agent, err := d.LoadKey(keys[attest.PurposeAction], &policies)
	if err != nil {
		return nil, err
	}
	b.policy, err = b.run("TPM2_Sign under the approved policy", 1, raw, func(int) error {
		_, err := agent.Sign(nil, digest[:], crypto.SHA256)
		return err
	})
	return raw, err
}

func (b *bench) signer(ctx context.Context, w *world, raw *measurement) error {
	c := client.New(w.socket())
	sign := func(int) error {
		_, err := c.SignJSON(ctx, []byte(order(client.NewID())))
		return err
	}
	for _, clients := range []int{1, 16} {
		m, err := b.run("signer through its socket", clients, raw, sign)
		if err != nil {
			return err
		}
		if clients == 1 {
			b.alone = m
		}
	}
	return b.echo(ctx)
}

// echo is HTTP and JSON over a unix socket and nothing else: where a part of
// the signer's time goes.
func (b *bench) echo(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "echo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		return err
	}
	s := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte(`{"id":"x","counter":1,"jws":"x"}`)) // the client may be gone
		}
	})}
	go func() { _ = s.Serve(l) }() // it ends with Close
	defer s.Close()
	c := client.New(filepath.Join(dir, "s"))
	b.wire, err = b.run("HTTP and JSON over a unix socket", 1, nil, func(int) error {
		_, err := c.SignJSON(ctx, []byte(order("x")))
		return err
	})
	return err
}

const benchScope = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

// verify measures the receiver with warm caches beside the standard library.
func (b *bench) verify(context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("raw"))
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return err
	}
	raw, err := b.run("ecdsa.VerifyASN1, raw", 1, nil, func(int) error {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
			return errors.New("does not verify")
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.check = raw
	if err := b.receive("verify.Receiver.Verify, warm", benchScope, key, raw); err != nil {
		return err
	}
	limits, err := scope.Parse([]byte(strings.Replace(benchScope, "{", benchLimits, 1)))
	if err != nil {
		return err
	}
	return b.receive("the same with limits over time", string(limits.Canonical()), key, raw)
}

// benchLimits begins a scope that has limits over time, too wide to refuse.
const benchLimits = `{"max_notional_per_window":[{"currency":"EUR","amount":"999999999999","window":{"rolling_s":3600}}],"max_qty_per_window":[{"instrument":"*","qty":"999999999","window":{"day_cut":"22:00"}}],"max_orders_per_window":[{"count":999999999,"window":{"rolling_s":60}}],`

// receive measures a receiver of one agent's orders under a scope, in canonical JSON.
func (b *bench) receive(name, text string, key *ecdsa.PrivateKey, raw *measurement) error {
	ca := testca.New(fatal{})
	leaf := ca.AgentWithKey(fatal{}, "bench", []byte(text), key, nil).Chain[0]
	config := func() verify.Config {
		return verify.Config{Audiences: []string{"XPAR"}, Roots: ca.Roots, Revocation: verify.NoRevocation{}, Replay: verify.NewMemoryStore(1<<30, time.Time{}), MaxLifetime: time.Hour, MaxSkew: time.Minute}
	}
	r, err := verify.NewReceiver(config())
	if err != nil {
		return err
	}
	h, err := jws.NewHeader("ES256", []*x509.Certificate{leaf}, true)
	if err != nil {
		return err
	}
	s, err := scope.ParseCanonical([]byte(text))
	if err != nil {
		return err
	}
	list := make([][]byte, 20_000) // signed beforehand
	for i := range list {
		if list[i], err = signedOrder(key, leaf, h, s, uint64(i+1)); err != nil {
			return err
		}
	}
	next := 0
	_, err = b.run(name, 1, raw, func(int) error {
		if next == len(list) { // again, for a receiver that has not seen them
			if r, err = verify.NewReceiver(config()); err != nil {
				return err
			}
			next = 0
		}
		next++
		_, err := r.Verify(context.Background(), list[next-1], nil)
		return err
	})
	return err
}

func signedOrder(key *ecdsa.PrivateKey, leaf *x509.Certificate, h *jws.Header, s *scope.Scope, n uint64) ([]byte, error) {
	a, err := scope.ParseAction([]byte(order(client.NewID())))
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	notional, err := scope.ParseDecimal("24496")
	if err != nil {
		return nil, err
	}
	st := &scope.Statement{Version: 1, Issuer: "CN=bench", Agent: leaf.URIs[0].String(), Audience: a.Audience, ID: a.ID, Counter: scope.Counter(n), Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Minute).Unix(),
		Kind: a.Kind, Order: a.Order, Party: a.Party, Decision: scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(leaf.Raw), Scope: s.Hash(), Notional: &scope.Amount{Amount: notional, Currency: "EUR"}}, Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now}}}
	if n > 1 {
		st.Previous = scope.Digest{1}
	}
	b, err := st.Marshal()
	if err != nil {
		return nil, err
	}
	input := h.SigningInput(b)
	sig, err := jws.Sign(key, input)
	if err != nil {
		return nil, err
	}
	return []byte(jws.Compact(input, sig)), nil
}

// record measures the record alone, under a plain scope and under every limit over time.
func (b *bench) record(context.Context) error {
	plain, err := scope.ParseCanonical([]byte(benchScope))
	if err != nil {
		return err
	}
	full, err := scope.Parse([]byte(everyLimit))
	if err != nil {
		return err
	}
	if err := b.limits(full); err != nil {
		return err
	}
	for _, x := range []struct {
		name  string
		scope *scope.Scope
	}{{"audit.Log.Record", plain}, {"audit.Log.Record, every limit", full}} {
		if err := b.recordUnder(x.name, x.scope); err != nil {
			return err
		}
	}
	return nil
}

// everyLimit is benchScope with each limit over time, none of which is reached.
var everyLimit = strings.Replace(strings.Replace(benchScope, `"version":1`, `"price_collar_bps":{"bps":1000,"source":"S","max_age_ms":86400000},
 "max_notional_per_window":[{"currency":"EUR","amount":"100000000000","window":{"rolling_s":60}},{"currency":"EUR","amount":"1000000000000","window":{"day_cut":"17:30","tz":"Europe/Paris"}}],
 "max_qty_per_window":[{"instrument":"*","qty":"1000000000","window":{"rolling_s":60}}],"max_orders_per_window":[{"count":10000000,"window":{"rolling_s":60}}],
 "max_messages_per_window":[{"count":10000000,"window":{"rolling_s":60}},{"venue":"XPAR","count":10000000,"window":{"rolling_s":60}}],
 "price_collar_window_bps":[{"bps":1000,"window":{"rolling_s":60}}],"max_instruments":[{"count":5,"window":{"day_cut":"00:00"}}],"max_venues":[{"count":5,"window":{"day_cut":"00:00"}}],
 "max_open_orders":{"count":100000},"max_open_notional":[{"currency":"EUR","amount":"1000000000000"}],
 "repeat_execution_throttle":[{"count":10000000,"window":{"rolling_s":60}},{"count":10000000,"window":{"rolling_s":60},"per":"strategy"}],"version":1`, 1), `"allowed_tif":["0"]`, `"allowed_tif":["3"]`, 1)

// benchPermit checks a fresh order. Under limits of what is open it is an immediate one, which is never open.
func benchPermit(s *scope.Scope) (*scope.Permit, error) {
	text := order(client.NewID())
	if strings.Contains(string(s.Canonical()), `"allowed_tif":["3"]`) {
		text = order(client.NewID(), `"TimeInForce":"0"`, `"TimeInForce":"3"`)
	}
	a, err := scope.ParseAction([]byte(text))
	if err != nil {
		return nil, err
	}
	price, err := scope.ParseDecimal("61.24")
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return scope.Check(s, a, scope.Env{Now: now, AttestedAt: now, Reference: &scope.ReferencePrice{Instrument: a.Instrument(), Price: price, Currency: "EUR", Source: "S", Time: now.Add(-time.Second)}})
}

// limits measures what checking costs, without a record.
func (b *bench) limits(full *scope.Scope) error {
	p, err := benchPermit(full)
	if err != nil {
		return err
	}
	if _, err := b.run("scope.Check", 1, nil, func(int) error {
		_, err := scope.Check(full, p.Action(), p.Env())
		return err
	}); err != nil {
		return err
	}
	book, at := scope.NewBook(), time.Now()
	_, err = b.run("scope.Book, every limit: check, state, add", 1, nil, func(int) error {
		at = at.Add(100 * time.Microsecond)
		u := scope.UseOf(p, at)
		if refusal := book.Check(full, u); refusal != nil {
			return refusal
		}
		book.Utilisation(full, u)
		book.Add(u)
		return nil
	})
	return err
}

func (b *bench) recordUnder(name string, s *scope.Scope) error {
	dir, err := os.MkdirTemp("", "record")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := audit.Open(context.Background(), filepath.Join(dir, "log.db"), audit.Options{})
	if err != nil {
		return err
	}
	defer l.Close()
	for _, clients := range []int{1, 16, 64} {
		m, err := b.run(name, clients, nil, func(int) error {
			p, err := benchPermit(s)
			if err != nil {
				return err
			}
			_, err = l.Record(context.Background(), p, audit.Identity{Agent: "spiffe://example.org/agent/a", Lifetime: time.Minute})
			return err
		})
		if err != nil {
			return err
		}
		if clients == 1 && b.commit == nil {
			b.commit = m
		}
	}
	return nil
}

// appraise measures the appraisal of a device in software, since a TPM would
// be what is measured. BenchmarkRenewal of package issuer has it with TLS and inventory.
func (b *bench) appraise(context.Context) error {
	d, err := forge.New()
	if err != nil {
		return err
	}
	pin, err := attest.SPKIDigest(d.Hello.EKPublic)
	if err != nil {
		return err
	}
	policy, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	area, err := attest.PolicyKeyPublic(&policy.PublicKey)
	if err != nil {
		return err
	}
	sel := []attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 2, 4, 7}}}
	approved, err := attest.SignPolicy(policy, "bench", d.Values(sel), nil)
	if err != nil {
		return err
	}
	auth, err := attest.AuthPolicy(area, nil)
	if err != nil {
		return err
	}
	e, err := attest.VerifyEK(&d.Hello, attest.EKOptions{Pin: pin[:], Now: time.Now()})
	if err != nil {
		return err
	}
	x := &attest.Expectation{Challenge: &attest.Challenge{Session: make([]byte, 16), Nonce: make([]byte, 32), PCRs: sel, PolicyKey: area, Policies: []attest.ApprovedPolicy{*approved},
		Keys: []attest.KeyRequest{{Purpose: attest.PurposeAction, Template: attest.KeyTemplate(auth)}}}, Binding: make([]byte, 32), Endorsement: e, SRK: d.Hello.SRKPublic, AK: d.Hello.AKPublic, AuthPolicies: map[string][]byte{attest.ModeLocal: auth}, AppraisalNow: time.Now()}
	ev, err := d.Evidence(x.Challenge, x.Binding)
	if err != nil {
		return err
	}
	_, err = b.run("attest.Appraise", runtime.NumCPU(), nil, func(int) error {
		_, err := attest.Appraise(x, ev)
		return err
	})
	return err
}

// fatal lets the test CA be used outside a test.
type fatal struct{}

func (fatal) Helper() {}

func (fatal) Fatal(args ...any) { panic(fmt.Sprint(args...)) } // no key can be made: nothing to measure
