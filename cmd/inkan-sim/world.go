package main

import (
	"cmp"
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"inkan/simulator"
)

// world is everything that the demo, the benchmarks and the crash test set up:
// a software TPM, an issuer and a signer as separate processes.
type world struct {
	*demo
	tpm       *simulator.TPM
	addresses struct{ Agent, Admin, Public string }
	agents    []string
	lifetime  string // of certificates
	scope     string // of the agents, YAML
	where     string // of attacks on the wire: where the agents' scope lets them call from, YAML
	regions   string // file that says where addresses are; empty: there is none
	signer    *process
	keptJWS   string // signed and not shown to the venue yet
	hsm       *simulator.SoftHSM
	bot       *bot // the demo's agent under inkan run; nil elsewhere

	withFaults bool // a module that does harm on demand stands before the token's
	faults     *simulator.FaultModule

	bindAtOnce    bool   // the signer leaves the TPM alone between actions, which root is to have; and it has a key for cancels
	caller        string // executable of the agent; empty: the inkan command
	withoutEpochs bool   // with an approver, and approvals without an epoch

	reserve      string // with an approver: scope of the reserve, YAML; empty: there is none
	withApprover bool   // agents' keys are in approver mode, under approvals with an epoch
	approverDir  string // of the approver whose TLS certificate the signer knows
	epoch        uint64 // of the host
	approverAt   []string
	keyURI       string // of the action key in the token; empty: it is in the TPM
	tlsURI       string // of the TLS key in the token; empty: it is in the TPM
	plainURI     string // the same with the PIN in a file, before it was sealed
}

const scopeYAML = `# What the agent may do.
version: 1
allowed_actions: [order.new, order.replace]
allowed_venues: [XPAR]
allowed_instruments:
  - id: isin:FR0000120271
allowed_sides: ["1", "2"]
allowed_ord_types: ["1", "2"]
allowed_tif: ["0", "3"]
max_order_notional:
  - {currency: EUR, amount: "25000"}
max_attestation_age_s: 86400
`

func newWorld(out io.Writer, inkan string, quiet bool) (*world, error) {
	bin, err := filepath.Abs(inkan)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(bin); err != nil {
		return nil, fmt.Errorf("--inkan %s: %w: make build makes it", inkan, err)
	}
	dir, err := os.MkdirTemp("", "inkan")
	if err != nil {
		return nil, err
	}
	return &world{demo: &demo{inkan: bin, dir: dir, out: out, quiet: quiet}, agents: []string{"mm-07"}, lifetime: "24h", scope: scopeYAML}, nil
}

func (w *world) end() {
	w.close()
	if w.tpm != nil {
		_ = w.tpm.Kill() // it ends with this process anyway
	}
	_ = os.RemoveAll(w.dir)
}

func (w *world) write(name, text string) error {
	return os.WriteFile(w.path(name), []byte(text), 0o600)
}

// startTPM puts measurements into the PCRs as firmware and boot loader would.
func (w *world) startTPM(ctx context.Context) error {
	w.say("   $ inkan-sim tpm --dir tpm &")
	t, err := simulator.StartTPM(ctx, w.path("tpm"))
	if err != nil {
		return err
	}
	w.tpm = t
	for _, pcr := range []int{0, 2, 4, 7} {
		if err := w.extend(pcr); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) startIssuer(ctx context.Context) error {
	ports, err := simulator.FreePorts(3)
	if err != nil {
		return err
	}
	args := []string{"issuer", "init", "--dir", w.path("issuer"), "--trust-domain", "example.org", "--lifetime", w.lifetime, "--agent-listen", ports[0], "--admin-listen", ports[1], "--public-listen", ports[2]}
	if w.regions != "" {
		args = append(args, "--regions", w.regions)
	}
	if _, err := w.run(ctx, args...); err != nil {
		return err
	}
	return w.startDaemon("issuer", &w.addresses, "issuer", "serve", "--dir", w.path("issuer"))
}

// startDaemon starts the inkan command as a daemon and reads the line of JSON
// with which it says that it is ready.
func (w *world) startDaemon(name string, ready any, args ...string) error {
	p, err := w.startReady(name, ready, args...)
	if name == "signer" {
		w.signer = p
	}
	return err
}

func (w *world) startReady(name string, ready any, args ...string) (*process, error) {
	r, wr, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := w.start(name, wr, w.inkan, args...)
	_ = wr.Close()
	if err != nil {
		return nil, err
	}
	if err := r.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return p, err
	}
	if err := json.NewDecoder(r).Decode(ready); err != nil {
		log, _ := os.ReadFile(w.path(name + ".log"))
		return p, fmt.Errorf("%s did not start: %s", name, strings.TrimSpace(string(log)))
	}
	return p, nil
}

// inventory tells the issuer of the device, its state and the agents.
func (w *world) inventory(ctx context.Context) error {
	dir := w.path("issuer")
	if err := w.write("scope.yaml", w.scope); err != nil {
		return err
	}
	if _, err := w.run(ctx, "tpm", "info", "--tpm", w.tpm.Address, "--ek-certificate-out", w.path("ek.pem")); err != nil {
		return err
	}
	if _, err := w.run(ctx, "issuer", "device", "add", "--dir", dir, "--id", "host1", "--ek-certificate", w.path("ek.pem"), "--ek-root", w.tpm.RootsFile(), "--ek-intermediate", w.tpm.IntermediatesFile()); err != nil {
		return err
	}
	if w.withApprover && !w.withoutEpochs {
		out, err := w.run(ctx, "tpm", "epoch", "--tpm", w.tpm.Address)
		if err != nil {
			return err
		}
		if w.epoch, err = strconv.ParseUint(strings.TrimSpace(out), 10, 64); err != nil {
			return err
		}
	}
	if err := w.approve(ctx, "first"); err != nil {
		return err
	}
	if w.withApprover {
		if err := w.approve(ctx, "with-approver", "--approver", w.path("approver", "approver.pub.pem")); err != nil {
			return err
		}
		if w.reserve != "" {
			if err := w.approve(ctx, "reserve", "--reserve", "--approver", w.path("approver", "approver.pub.pem")); err != nil {
				return err
			}
		}
		if w.epoch > 0 {
			if err := w.demandEpoch(ctx); err != nil {
				return err
			}
		}
	}
	for _, a := range w.agents {
		if _, err := w.run(ctx, append([]string{"issuer", "agent", "add", "--dir", dir, "--name", a, "--device", "host1", "--scope", w.path("scope.yaml")}, w.keyFlags()...)...); err != nil {
			return err
		}
	}
	return nil
}

// approve approves the state that the host is in.
func (w *world) approve(ctx context.Context, name string, more ...string) error {
	pcrs, err := w.run(ctx, "tpm", "pcrs", "--tpm", w.tpm.Address, "--pcr", "sha256:0,2,4,7", "--json")
	if err != nil {
		return err
	}
	if err := w.write("pcrs.json", pcrs); err != nil {
		return err
	}
	if w.epoch > 0 {
		more = append(more, "--device", "host1", "--epoch", fmt.Sprint(w.epoch))
	}
	_, err = w.run(ctx, append([]string{"issuer", "policy", "approve", "--dir", w.path("issuer"), "--name", name, "--pcrs", w.path("pcrs.json")}, more...)...)
	return err
}

// demandEpoch has the issuer demand the epoch at the next enrolment.
func (w *world) demandEpoch(ctx context.Context) error {
	_, err := w.run(ctx, "issuer", "device", "epoch", "--dir", w.path("issuer"), "--id", "host1", "--at-least", fmt.Sprint(w.epoch))
	return err
}

// signerConfig writes a configuration whose agents are told apart by their
// callers' executables: the inkan command itself for the first, copies of it for others.
func (w *world) signerConfig(executables map[string]string) error {
	me, err := user.Current()
	if err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "socket: run/signer.sock\nstate_dir: state\ntpm: %s\nissuer:\n  url: https://%s\n  ca: issuer/ca.pem\nagents:\n", w.tpm.Address, w.addresses.Agent)
	for _, a := range w.agents {
		fmt.Fprintf(&b, "  - name: %s\n    max_concurrent: 1024\n    callers:\n      - user: \"%s\"\n        executable: %s\n%s", a, me.Uid, executables[a], w.keyLine())
	}
	if w.bot != nil {
		b.WriteString(w.bot.signerEntry())
	}
	if w.withApprover {
		b.WriteString("approvers:\n")
		for _, at := range w.approverAt {
			fmt.Fprintf(&b, "  - url: https://%s\n    ca: %s/tls.pem\n", at, cmp.Or(w.approverDir, "approver"))
		}
	}
	return w.write("signer.yaml", b.String())
}

func (w *world) socket() string { return w.path("run", "signer.sock") }

func (w *world) startSigner() error {
	var ready struct{ Socket string }
	return w.startDaemon("signer", &ready, "signer", "serve", "--config", w.path("signer.yaml"))
}

// order returns an order in JSON. Changes are pairs of what to replace by what.
func order(id string, changes ...string) string {
	text := fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-991","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"},"pty":{"dec":{"algo":"LLM-MM-07"},"exe":{"algo":"LLM-MM-07"}}}`, id)
	return strings.NewReplacer(changes...).Replace(text)
}

func (w *world) extend(pcr int) error {
	return w.tpm.ExtendPCR(pcr, fmt.Appendf(nil, "measurement of PCR %d", pcr))
}

const sha256Hash = crypto.SHA256

func decode(s string) []byte {
	b, _ := base64.RawURLEncoding.DecodeString(s) // what does not decode is an attack on itself
	return b
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
