package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/attest"
	"inkan/hsm"
	"inkan/internal/anchor"
	"inkan/internal/attester"
	"inkan/internal/durable"
	"inkan/internal/keyuri"
	"inkan/journal"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
)

func signerCommand(e *env) *cli.Command {
	config := func(more ...cli.Flag) []cli.Flag {
		return append([]cli.Flag{&cli.StringFlag{Name: "config", Value: "/etc/inkan/signer.yaml", Usage: "configuration `FILE`"}}, more...)
	}
	return &cli.Command{
		Name:  "signer",
		Usage: "sign the actions of agents on this host",
		Subcommands: []*cli.Command{
			{Name: "enrol", Usage: "make the agents' keys in the TPM and have them certified", Flags: config(jsonFlag(), &cli.StringFlag{Name: "agent", Usage: "only the agent with this `NAME`"}),
				Action: func(c *cli.Context) error { return signerEnrol(e, c) }},
			{Name: "serve", Usage: "serve agents; enrols what has no certificate, and renews", Flags: config(), Action: func(c *cli.Context) error { return signerServe(e, c) }},
			{Name: "check", Usage: "check a configuration file", Flags: config(jsonFlag()), Action: func(c *cli.Context) error {
				if _, err := readSignerConfig(c); err != nil {
					return err
				}
				return e.valid(c)
			}},
			{Name: "seal-pin", Usage: "seal an HSM's PIN to this host's TPM, for as long as the host is in an approved state", Flags: config(jsonFlag(),
				&cli.StringFlag{Name: "agent", Usage: "`NAME` of the agent whose key is in the HSM"},
				&cli.StringFlag{Name: "pin-source", Usage: "where the PIN is now: file:/path, fd:3 or credential:name: `SOURCE`"},
				&cli.StringFlag{Name: "out", Usage: "write the sealed PIN to `FILE`"}),
				Action: func(c *cli.Context) error { return signerSealPIN(e, c) }},
			{Name: "recover", Usage: "take an agent's record up again that may not be all that was recorded; for operators", Flags: []cli.Flag{socketFlag(), jsonFlag(),
				&cli.StringFlag{Name: "agent", Usage: "`NAME`"}, &cli.StringFlag{Name: "reason", Usage: "why this is in order, for the record: `TEXT`"}}, Action: func(c *cli.Context) error { return signerRecover(e, c) }},
			{Name: "status", Usage: "show the agent that the calling process is", Flags: signerFlags(jsonFlag()), Action: func(c *cli.Context) error { return signerStatus(e, c) }},
		},
	}
}

func readSignerConfig(c *cli.Context) (*signer.Config, error) {
	path, err := filepath.Abs(c.String("config"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	config, err := signer.ParseConfig(b, filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	counters := make(map[uint32]string)
	for _, a := range config.Agents {
		i := tpm.CounterIndex(a.Name)
		if other, taken := counters[i]; taken {
			return nil, fmt.Errorf("agents %s and %s would have one counter in the TPM (%#x): name one of them otherwise", other, a.Name, i)
		}
		counters[i] = a.Name
	}
	return config, nil
}

// host is this machine as the issuer sees it: a TPM and agents' state.
type host struct {
	config  *signer.Config
	dev     *tpm.Device // nil: the host has no TPM
	issuer  attester.Issuer
	journal *journal.Journal         // of what the TPM signs; nil: none is kept
	keys    map[string]*tpm.Key      // action keys in the TPM, by agent
	tokens  map[string]crypto.Signer // keys in a token, by agent and purpose
	stats   map[string]func() signer.DeviceStatus
	tls     map[string]*tpm.Key // TLS keys of agents in approver mode
	cancel  map[string]*tpm.Key // keys for cancels alone, of such agents
	reserve map[string]*tpm.Key // keys in reserve mode, likewise
	audit   string              // on, or why the TPM does not testify to its signatures
	closer  []io.Closer
}

// close closes the TPM and the tokens.
func (h *host) close() {
	for _, c := range h.closer {
		_ = c.Close() // the process ends; nothing is left to save
	}
}

// external opens the agent's keys in tokens, by purpose; nil if it has none there.
func (h *host) external(ctx context.Context, agent string) (map[string]crypto.Signer, error) {
	var out map[string]crypto.Signer
	for _, a := range h.config.Agents {
		if a.Name != agent {
			continue
		}
		for purpose, uri := range map[string]string{attest.PurposeAction: a.Key, attest.PurposeTLS: a.TLSKey} {
			if uri == "" {
				continue
			}
			k, err := h.tokenKey(ctx, agent, purpose, uri)
			if err != nil {
				return nil, fmt.Errorf("agent %s: %s key: %w", agent, purpose, err)
			}
			if out == nil {
				out = make(map[string]crypto.Signer)
			}
			out[purpose] = k
		}
	}
	return out, nil
}

// tokenKey opens a key in a token once.
func (h *host) tokenKey(ctx context.Context, agent, purpose, uri string) (crypto.Signer, error) {
	name := agent + " " + purpose
	if k := h.tokens[name]; k != nil {
		return k, nil
	}
	k, closer, err := keyuri.OpenSealed(uri, func(file []byte) ([]byte, error) { return h.unseal(ctx, agent, file) })
	if err != nil {
		return nil, err
	}
	h.tokens[name], h.closer = k, append(h.closer, closer)
	if t, ok := closer.(*hsm.Token); ok && purpose == attest.PurposeAction {
		h.stats[agent] = func() signer.DeviceStatus {
			s := t.Stats()
			return signer.DeviceStatus{Kind: "pkcs11", WorkerPID: s.WorkerPID, Generation: s.Generation, Sessions: s.Sessions, Breaker: s.Breaker,
				Signatures: s.Signatures, Failures: s.Failures, LastError: s.LastError, LatencySeconds: s.Latency.Seconds()}
		}
	}
	return k, nil
}

// vouched adds what the HSM's maker says of the key, where there is such a file.
func (h *host) vouched(agent string, external map[string]crypto.Signer) (map[string]crypto.Signer, error) {
	for _, a := range h.config.Agents {
		if a.Name != agent || a.KeyEvidence == "" || external == nil {
			continue
		}
		b, err := os.ReadFile(a.KeyEvidence)
		if err != nil {
			return nil, fmt.Errorf("key_evidence: %w", err)
		}
		if len(b) > attest.MaxVendor {
			return nil, fmt.Errorf("key_evidence %s: %d bytes, at most %d are allowed", a.KeyEvidence, len(b), attest.MaxVendor)
		}
		out := maps.Clone(external)
		out[attest.PurposeAction] = attester.WithVendor(external[attest.PurposeAction], b)
		return out, nil
	}
	return external, nil
}

// unseal opens a PIN that was sealed under the policies of the agent's issuer.
// The host may be in a state that was approved since it last asked.
func (h *host) unseal(ctx context.Context, agent string, file []byte) ([]byte, error) {
	state := signer.ReadState(h.config.StateDir, agent)
	var saved tpm.Policies
	if ok, err := state.Policies(&saved); err == nil && ok {
		secret, err := h.dev.Unseal(file, &saved)
		if err == nil || errors.Is(err, tpm.ErrForeignKey) {
			return secret, err
		}
	}
	policies, err := attester.Policies(ctx, h.issuer, h.dev, agent)
	if err != nil {
		return nil, err
	}
	return h.dev.Unseal(file, policies)
}

// hierarchyAuth reads the authorizations of the TPM's hierarchies.
func hierarchyAuth(config *signer.Config) (tpm.Options, error) {
	var o tpm.Options
	for _, f := range []struct {
		path string
		to   *[]byte
	}{{config.OwnerAuthFile, &o.OwnerAuth}, {config.EndorsementF, &o.EndorsementAuth}} {
		if f.path == "" {
			continue
		}
		b, err := os.ReadFile(f.path)
		if err != nil {
			return o, err
		}
		*f.to = []byte(strings.TrimRight(string(b), "\n"))
	}
	return o, nil
}

func openHost(config *signer.Config) (*host, error) {
	roots, err := readPool(config.Issuer.CA)
	if err != nil {
		return nil, fmt.Errorf("issuer.ca: %w", err)
	}
	o, err := hierarchyAuth(config)
	if err != nil {
		return nil, err
	}
	h := &host{config: config, issuer: attester.Issuer{URL: config.Issuer.URL, Roots: roots}, keys: make(map[string]*tpm.Key), tokens: make(map[string]crypto.Signer), tls: make(map[string]*tpm.Key), cancel: make(map[string]*tpm.Key), reserve: make(map[string]*tpm.Key), stats: make(map[string]func() signer.DeviceStatus)}
	if config.TPM == "" {
		return h, nil
	}
	if h.dev, err = tpm.OpenWith(config.TPM, o); err != nil {
		return nil, err
	}
	h.closer = append(h.closer, h.dev)
	return h, nil
}

// openSigningHost is openHost for what has the TPM sign.
func openSigningHost(config *signer.Config) (*host, error) {
	h, err := openHost(config)
	if err != nil {
		return nil, err
	}
	if err := h.startAudit(); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// startAudit has the TPM testify to its signatures, and keeps a journal of them.
func (h *host) startAudit() error {
	if h.dev == nil {
		h.audit = "there is no TPM"
		return nil
	}
	if h.config.CommandAudit == signer.AuditOff {
		h.audit = "off in the configuration"
		return nil
	}
	if err := os.MkdirAll(h.config.StateDir, 0o700); err != nil {
		return err
	}
	j, err := journal.Open(filepath.Join(h.config.StateDir, journal.FileName))
	if err != nil {
		return err
	}
	h.closer, h.journal = append(h.closer, j), j
	err = h.dev.StartAudit(j)
	if err == nil {
		_, err = h.dev.Testify(nil)
	}
	if err != nil && h.config.CommandAudit == signer.AuditRequired {
		return fmt.Errorf("command_audit: %w", err)
	}
	if h.audit = "on"; err != nil {
		h.audit = err.Error()
	}
	return nil
}

// testify has the TPM say what it signed since the last time.
func (h *host) testify() error {
	_, err := h.dev.Testify(nil)
	return err
}

// enrol runs one exchange for an agent and keeps its outcome.
func (h *host) enrol(ctx context.Context, agent string) ([]*x509.Certificate, time.Time, error) {
	state, err := signer.OpenState(h.config.StateDir, agent)
	if err != nil {
		return nil, time.Time{}, err
	}
	keys, err := state.Keys(attest.PurposeAction, attest.PurposeTLS, attest.PurposeCancel, attest.PurposeReserve)
	if err != nil {
		return nil, time.Time{}, err
	}
	external, err := h.external(ctx, agent)
	if err != nil {
		return nil, time.Time{}, err
	}
	if h.dev == nil {
		return h.declare(ctx, agent, state, external[attest.PurposeAction])
	}
	vouched, err := h.vouched(agent, external)
	if err != nil {
		return nil, time.Time{}, err
	}
	// To what the record is bound. A host that has a certificate and no such counter has lost it.
	if err := h.dev.Counter(agent).Make(); err != nil {
		return nil, time.Time{}, err
	}
	out, err := attester.Run(ctx, h.issuer, h.dev, h.journal, agent, keys, vouched, state.SaveKeys)
	if err != nil {
		return nil, time.Time{}, err
	}
	var action []*x509.Certificate
	for purpose, k := range external {
		chain, err := out.Chain(purpose, k.Public())
		if err != nil {
			return nil, time.Time{}, err
		}
		if err := state.SaveChain(purpose, chain); err != nil {
			return nil, time.Time{}, err
		}
		if purpose == attest.PurposeAction {
			action = chain
		}
	}
	for purpose, file := range out.Keys {
		k, err := h.dev.LoadKey(file, out.Policies)
		if err != nil {
			return nil, time.Time{}, err
		}
		chain, err := out.Chain(purpose, k.Public())
		if err != nil {
			return nil, time.Time{}, err
		}
		if err := state.SaveChain(purpose, chain); err != nil {
			return nil, time.Time{}, err
		}
		if purpose == attest.PurposeAction {
			action = chain
		}
	}
	if len(action) == 0 {
		return nil, time.Time{}, errors.New("the issuer sent no action certificate")
	}
	return action, out.Grant.RenewAfter, h.keepPolicies(out.Policies)
}

// declare is enrol on a host without a TPM.
func (h *host) declare(ctx context.Context, agent string, state *signer.State, key crypto.Signer) ([]*x509.Certificate, time.Time, error) {
	out, err := attester.Declare(ctx, h.issuer, agent, key)
	if err != nil {
		return nil, time.Time{}, err
	}
	chain, err := out.Chain(attest.PurposeAction, key.Public())
	if err != nil {
		return nil, time.Time{}, err
	}
	return chain, out.Grant.RenewAfter, state.SaveChain(attest.PurposeAction, chain)
}

// keepPolicies keeps what the issuer approved for this host, for every agent
// that has keys: an epoch that one agent's renewal began is all agents'.
func (h *host) keepPolicies(p *tpm.Policies) error {
	for _, a := range h.config.Agents {
		state, err := signer.OpenState(h.config.StateDir, a.Name)
		if err != nil {
			return err
		}
		if err := state.SavePolicies(p); err != nil {
			return err
		}
		for _, k := range []*tpm.Key{h.keys[a.Name], h.tls[a.Name], h.cancel[a.Name], h.reserve[a.Name]} {
			if k != nil {
				k.SetPolicies(p)
			}
		}
	}
	return nil
}

// Renew implements signer.Renewer.
func (h *host) Renew(ctx context.Context, agent string) ([]*x509.Certificate, time.Time, error) {
	return h.enrol(ctx, agent)
}

// credentials loads an agent's key and certificate; an agent without a valid
// certificate for its key is enrolled first. If it cannot be, and had one, it signs nothing
// until it is renewed, and does not keep the other agents from it.
func (h *host) credentials(ctx context.Context, agent string, log *slog.Logger) (signer.Credentials, error) {
	state, err := signer.OpenState(h.config.StateDir, agent)
	if err != nil {
		return signer.Credentials{}, err
	}
	chain, err := state.Chain(attest.PurposeAction)
	if err != nil {
		return signer.Credentials{}, err
	}
	external, err := h.external(ctx, agent)
	if err != nil {
		return signer.Credentials{}, err
	}
	// A kill between a new key and its certificate leaves that of the key before.
	ours := func() (bool, error) {
		if len(chain) == 0 {
			return false, nil
		}
		return h.certified(state, external[attest.PurposeAction], chain[0])
	}
	certified, err := ours()
	if err != nil {
		return signer.Credentials{}, fmt.Errorf("agent %s: %w", agent, err)
	}
	if !certified || !time.Now().Before(chain[0].NotAfter) {
		fresh, _, failed := h.enrol(ctx, agent)
		if failed == nil {
			chain = fresh
		} else if certified, err = ours(); err != nil || !certified || ctx.Err() != nil {
			return signer.Credentials{}, fmt.Errorf("enrolling agent %s: %w", agent, failed)
		} else {
			log.ErrorContext(ctx, "the agent's certificate is over and was not renewed", "agent", agent, "not_after", chain[0].NotAfter, "error", failed)
		}
	}
	if k := external[attest.PurposeAction]; k != nil {
		cred := signer.Credentials{Key: k, Chain: chain, Device: h.stats[agent]}
		if h.dev != nil {
			cred.Anchor = anchor.New(h.dev, agent)
		}
		return cred, nil
	}
	keys, err := state.Keys(attest.PurposeAction)
	if err != nil {
		return signer.Credentials{}, err
	}
	var policies tpm.Policies
	if ok, err := state.Policies(&policies); err != nil || !ok {
		return signer.Credentials{}, fmt.Errorf("agent %s: its policies cannot be read: enrol it anew: %w", agent, err)
	}
	k, err := h.dev.LoadKey(keys[attest.PurposeAction], &policies)
	if err != nil {
		return signer.Credentials{}, fmt.Errorf("agent %s: %w", agent, err)
	}
	h.keys[agent] = k
	cred := signer.Credentials{Key: k, Chain: chain, Anchor: anchor.New(h.dev, agent), Device: func() signer.DeviceStatus { return signer.DeviceStatus{Kind: "tpm", CommandAudit: h.audit} }}
	if h.dev.Audited() {
		cred.Testify = h.testify
	}
	if cred.Cancel, err = h.cancels(agent, state, &policies); err != nil {
		return signer.Credentials{}, fmt.Errorf("agent %s: %w", agent, err)
	}
	if cred.Reserve, err = h.reserves(agent, state, &policies); err != nil {
		return signer.Credentials{}, fmt.Errorf("agent %s: %w", agent, err)
	}
	if k.Mode() == attest.ModeApprover {
		if cred.Approvers, err = h.approvers(agent, state, &policies); err != nil {
			return signer.Credentials{}, fmt.Errorf("agent %s: %w", agent, err)
		}
	}
	return cred, nil
}

// certified says whether a certificate is for the agent's action key, which is
// in the TPM if it is not external.
func (h *host) certified(state *signer.State, external crypto.Signer, c *x509.Certificate) (bool, error) {
	k := external
	if k == nil {
		files, err := state.Keys(attest.PurposeAction)
		if err != nil || files[attest.PurposeAction] == nil {
			return false, err
		}
		inTPM, err := h.dev.LoadKey(files[attest.PurposeAction], nil)
		if err != nil { // of another TPM, too: enrolling there is for an operator to ask for
			return false, err
		}
		k = inTPM
	}
	public, ok := k.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(c.PublicKey), nil
}

// cancels loads an agent's key for cancels, if the configuration asks for it.
func (h *host) cancels(agent string, state *signer.State, policies *tpm.Policies) (*signer.CancelCredentials, error) {
	for _, a := range h.config.Agents {
		if a.Name != agent || !a.Cancels {
			continue
		}
		keys, err := state.Keys(attest.PurposeCancel)
		if err != nil {
			return nil, err
		}
		if keys[attest.PurposeCancel] == nil {
			return nil, errors.New("cancel_without_approver: the issuer certified no key for cancels: its inventory must allow it (inkan issuer agent add --cancel-without-approver); then enrol the agent anew")
		}
		k, err := h.dev.LoadKey(keys[attest.PurposeCancel], policies)
		if err != nil {
			return nil, err
		}
		h.cancel[agent] = k
		return &signer.CancelCredentials{Key: k, Chain: func() ([]*x509.Certificate, error) { return state.Chain(attest.PurposeCancel) }}, nil
	}
	return nil, nil
}

// reserves loads an agent's key in reserve mode, if the configuration asks for it.
func (h *host) reserves(agent string, state *signer.State, policies *tpm.Policies) (*signer.ReserveCredentials, error) {
	i := slices.IndexFunc(h.config.Agents, func(a signer.AgentConfig) bool { return a.Name == agent && a.Reserve })
	if i < 0 {
		return nil, nil
	}
	keys, err := state.Keys(attest.PurposeReserve)
	if err != nil {
		return nil, err
	}
	if keys[attest.PurposeReserve] == nil {
		return nil, errors.New("reserve: the issuer certified no key for it: its inventory must allow it (inkan issuer agent add --reserve); then enrol the agent anew")
	}
	k, err := h.dev.LoadKey(keys[attest.PurposeReserve], policies)
	if err != nil {
		return nil, err
	}
	h.reserve[agent] = k
	return &signer.ReserveCredentials{Key: k, Until: k.Reserved, Chain: func() ([]*x509.Certificate, error) { return state.Chain(attest.PurposeReserve) },
		Renew: func(o crypto.SignerOpts) (time.Time, error) { return k.Reserve(o.(tpm.Authorizer)) }}, nil
}

func signerEnrol(e *env, c *cli.Context) error {
	config, err := readSignerConfig(c)
	if err != nil {
		return err
	}
	h, err := openSigningHost(config)
	if err != nil {
		return err
	}
	defer h.close()
	type enrolled struct {
		Agent    string    `json:"agent"`
		Serial   string    `json:"serial"`
		NotAfter time.Time `json:"not_after"`
	}
	var list []enrolled
	for _, a := range config.Agents {
		if only := c.String("agent"); only != "" && only != a.Name {
			continue
		}
		fmt.Fprintf(e.stderr, "enrolling %s ...\n", a.Name)
		chain, _, err := h.enrol(c.Context, a.Name)
		if err != nil {
			return fmt.Errorf("enrolling agent %s: %w", a.Name, err)
		}
		list = append(list, enrolled{a.Name, fmt.Sprintf("%x", chain[0].SerialNumber), chain[0].NotAfter.UTC()})
	}
	if len(list) == 0 {
		return fmt.Errorf("the configuration has no agent %q", c.String("agent"))
	}
	return e.show(c, list, func() {
		for _, x := range list {
			e.printf("%s has the certificate %s until %s\n", x.Agent, x.Serial, x.NotAfter.Format(time.RFC3339))
		}
	})
}

// signerRecover is an operator's; what it does stands in the record.
func signerRecover(e *env, c *cli.Context) error {
	agent, err := required(c, "agent")
	if err != nil {
		return err
	}
	reason, err := required(c, "reason")
	if err != nil {
		return err
	}
	var out signer.Recovered
	if err := client.New(c.String("socket")).Recover(c.Context, agent, reason, &out); err != nil {
		return refusedOr(err)
	}
	return e.show(c, out, func() {
		e.printf("%s signs again; the recovery is entry %d\nit follows: %s\n", out.Agent, out.Counter, out.Found)
	})
}

func signerSealPIN(e *env, c *cli.Context) error {
	var agent, source, out string
	for name, to := range map[string]*string{"agent": &agent, "pin-source": &source, "out": &out} {
		var err error
		if *to, err = required(c, name); err != nil {
			return err
		}
	}
	config, err := readSignerConfig(c)
	if err != nil {
		return err
	}
	if out, err = filepath.Abs(out); err != nil {
		return err
	}
	pin, err := hsm.ReadPIN(source, nil)
	if err != nil {
		return err
	}
	if config.TPM == "" {
		return errors.New("there is no tpm in the configuration, so nothing to seal to")
	}
	h, err := openHost(config)
	if err != nil {
		return err
	}
	defer h.close()
	policies, err := attester.Policies(c.Context, h.issuer, h.dev, agent)
	if err != nil {
		return err
	}
	sealed, err := h.dev.Seal(pin.Reveal(), policies)
	if err != nil {
		return err
	}
	// A PIN that could not be opened again would be found out at the worst moment.
	if _, err := h.dev.Unseal(sealed, policies); err != nil {
		return fmt.Errorf("the PIN could not be opened again, so nothing was written: %w", err)
	}
	if err := durable.WriteFile(out, sealed, 0o600); err != nil {
		return err
	}
	return e.show(c, map[string]string{"pin_source": "sealed:" + out}, func() {
		e.printf("sealed; the key's URI takes pin-source=sealed:%s\nremove the PIN from %s\n", out, source)
	})
}

func signerServe(e *env, c *cli.Context) error {
	config, err := readSignerConfig(c)
	if err != nil {
		return err
	}
	h, err := openSigningHost(config)
	if err != nil {
		return err
	}
	defer h.close()
	credentials, log := make(map[string]signer.Credentials), logger(e)
	for _, a := range config.Agents {
		if credentials[a.Name], err = h.credentials(c.Context, a.Name, log); err != nil {
			return err
		}
	}
	s, err := signer.Open(c.Context, config, credentials, h, log)
	if err != nil {
		return err
	}
	debug.SetGCPercent(400) // a small heap with much passing through it: collect less often
	err = s.Serve(interrupted(c), func() {
		if err := e.printJSON(map[string]any{"socket": config.Socket, "agents": len(config.Agents)}); err != nil {
			fmt.Fprintf(e.stderr, "inkan: %v\n", err)
		}
	})
	return errors.Join(err, s.Close())
}

func socketFlag() cli.Flag {
	return &cli.StringFlag{Name: "socket", Value: "/run/inkan/signer.sock", Usage: "the signer's `SOCKET`"}
}

func signerStatus(e *env, c *cli.Context) error {
	var info signer.AgentInfo
	to, err := theSigner(c)
	if err != nil {
		return err
	}
	if err := to.Get(c.Context, "/v1/agent", &info); err != nil {
		return refusedOr(err)
	}
	return e.show(c, info, func() {
		e.printf("%s  %s\ncertificate until %s, %d entries in the record\n", info.Name, info.ID, info.NotAfter.Format(time.RFC3339), info.Entries)
		for _, line := range info.Description {
			e.printf("  %s\n", line)
		}
	})
}
