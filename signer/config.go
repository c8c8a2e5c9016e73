package signer

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"inkan/internal/clock"
	"inkan/internal/strictjson"
)

// maxConfig bounds a configuration file, in bytes.
const maxConfig = 256 << 10

// Config is a signer's configuration file.
type Config struct {
	Socket        string         `json:"socket"`                   // unix socket for agents; systemd may hand over its own
	SocketMode    string         `json:"socket_mode,omitempty"`    // octal; 0666 by default: callers are authenticated, whoever they are
	StateDir      string         `json:"state_dir"`                // keys, certificates and records
	MetricsListen string         `json:"metrics_listen,omitempty"` // host:port; empty: none
	TPM           string         `json:"tpm,omitempty"`            // /dev/tpmrm0, or the socket of a software TPM; empty: the host has none, and all keys are in HSMs
	OwnerAuthFile string         `json:"owner_auth_file,omitempty"`
	EndorsementF  string         `json:"endorsement_auth_file,omitempty"`
	Issuer        IssuerConfig   `json:"issuer"`
	Agents        []AgentConfig  `json:"agents"`
	Operators     []CallerConfig `json:"operators,omitempty"` // processes that may see the status of all agents; root and the signer's own user by default
	Remote        *RemoteConfig  `json:"remote,omitempty"`    // agents on other hosts; none by default
	Clock         *ClockConfig   `json:"clock,omitempty"`

	CommandAudit string `json:"command_audit,omitempty"` // auto (default): the TPM testifies to its signatures if it can; required; off

	Approvers       []ApproverConfig `json:"approvers,omitempty"`        // for keys in approver mode, in the order in which they are asked
	ApproverHedge   string           `json:"approver_hedge,omitempty"`   // after what time the next one is asked besides; 100ms by default
	ApproverTimeout string           `json:"approver_timeout,omitempty"` // after what time an action is refused; 2s by default

	hedge, giveUp time.Duration

	mode os.FileMode
}

// ClockConfig says who keeps the clock and how far it may be from UTC.
type ClockConfig struct {
	Source        string `json:"source,omitempty"`         // auto, chrony, kernel or none; auto by default
	Chrony        string `json:"chrony,omitempty"`         // where chronyd listens, if not where chronyc looks for it
	MaxDivergence string `json:"max_divergence,omitempty"` // 1us to 1m; no bound by default but the scope's

	max uint64 // microseconds
}

func (c *ClockConfig) validate() error {
	if c.Source == "" {
		c.Source = clock.Auto
	}
	if !slices.Contains([]string{clock.Auto, clock.Chrony, clock.Kernel, clock.None}, c.Source) {
		return fmt.Errorf("clock.source %.16q: auto, chrony, kernel or none is expected", c.Source)
	}
	if c.MaxDivergence == "" {
		return nil
	}
	d, err := time.ParseDuration(c.MaxDivergence)
	if err != nil || d < time.Microsecond || d > time.Minute {
		return fmt.Errorf("clock.max_divergence %.16q: 1us to 1m is expected", c.MaxDivergence)
	}
	if c.Source == clock.None {
		return errors.New("clock.max_divergence needs a source other than none")
	}
	c.max = uint64(d.Microseconds())
	return nil
}

// IssuerConfig says where certificates come from.
type IssuerConfig struct {
	URL string `json:"url"` // https, the agents' API
	CA  string `json:"ca"`  // PEM file with the CA certificate

	KillInterval string `json:"kill_interval,omitempty"` // how often the issuer's kills are looked at, 3s by default

	kills time.Duration
}

// Values of command_audit.
const (
	AuditAuto     = "auto"
	AuditRequired = "required"
	AuditOff      = "off"
)

// ApproverConfig is an approver that the signer asks.
type ApproverConfig struct {
	URL string `json:"url"` // https
	CA  string `json:"ca"`  // PEM file with what its TLS certificate chains to
}

// AgentConfig is one agent that the signer serves.
type AgentConfig struct {
	Name              string         `json:"name"`
	Key               string         `json:"key,omitempty"`          // pkcs11: URI of the action key, if it is not in the TPM
	TLSKey            string         `json:"tls_key,omitempty"`      // pkcs11: URI of the TLS key, if it is not in the TPM
	KeyEvidence       string         `json:"key_evidence,omitempty"` // file with what the HSM's maker says of the key
	Callers           []CallerConfig `json:"callers"`
	StatementLifetime string         `json:"statement_lifetime,omitempty"`  // 30s by default, at most 5m
	ReferencePrices   string         `json:"reference_prices,omitempty"`    // file
	ReferenceKey      string         `json:"reference_key,omitempty"`       // PEM file: the prices are a JWS by this key
	Policy            string         `json:"policy,omitempty"`              // file with a signed policy, taken over when it changes
	MaxConcurrent     int            `json:"max_concurrent,omitzero"`       // requests at a time, 64 by default
	CheckpointEvery   string         `json:"checkpoint_interval,omitempty"` // how often the record's head is signed, 10m by default
	RollbackInterval  string         `json:"rollback_interval,omitempty"`   // how often the record is bound to the TPM's counter, 1s by default; 0s: before each answer

	// Of an agent in approver mode: cancels are signed with a key of their own, without an approver.
	Cancels bool `json:"cancel_without_approver,omitzero"`
	// Likewise: while no approver answers, actions are signed with the reserve's key.
	Reserve bool `json:"reserve,omitzero"`

	lifetime, checkpoints, bindEvery time.Duration
}

// CallerConfig is who may act as the agent: a kind of process on this host, or a
// workload on another. All members that are given must hold; user or spiffe_id is.
type CallerConfig struct {
	User       string `json:"user,omitempty"`              // name or number
	Executable string `json:"executable,omitempty"`        // path of a file, which is hashed at the start
	SHA256     string `json:"executable_sha256,omitempty"` // of the executable, hex
	Unit       string `json:"unit,omitempty"`              // systemd unit
	Launcher   bool   `json:"launcher,omitzero"`           // it may start the agent (inkan run), and does not act as it

	SPIFFEID string   `json:"spiffe_id,omitempty"` // of a workload on another host
	Networks []string `json:"networks,omitempty"`  // that it may call from; any by default
	JWT      bool     `json:"jwt,omitzero"`        // it may show a JWT-SVID instead of a certificate

	uid      uint32
	digest   *[32]byte
	id       spiffeid.ID
	networks []netip.Prefix
}

// ApproverTimes returns after what time the next approver is asked besides, and
// after what time all are given up.
func (c *Config) ApproverTimes() (hedge, timeout time.Duration) { return c.hedge, c.giveUp }

// ParseConfig reads a configuration file, strictly. Relative paths are below dir.
func ParseConfig(b []byte, dir string) (*Config, error) {
	var c Config
	if err := strictjson.UnmarshalYAML(b, maxConfig, &c); err != nil {
		return nil, fmt.Errorf("signer configuration: %w", err)
	}
	if err := c.validate(dir); err != nil {
		return nil, fmt.Errorf("signer configuration: %w", err)
	}
	return &c, nil
}

func (c *Config) validate(dir string) error {
	below := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for name, v := range map[string]string{"socket": c.Socket, "state_dir": c.StateDir, "issuer.url": c.Issuer.URL, "issuer.ca": c.Issuer.CA} {
		if v == "" {
			return fmt.Errorf("%s is missing", name)
		}
	}
	for _, p := range []*string{&c.Socket, &c.StateDir, &c.TPM, &c.Issuer.CA, &c.OwnerAuthFile, &c.EndorsementF} {
		below(p)
	}
	switch c.CommandAudit {
	case "":
		c.CommandAudit = AuditAuto
	case AuditAuto, AuditOff:
	case AuditRequired:
		if c.TPM == "" {
			return errors.New("command_audit: required, and there is no tpm that could testify")
		}
	default:
		return fmt.Errorf("command_audit %.16q: %s, %s or %s is expected", c.CommandAudit, AuditAuto, AuditRequired, AuditOff)
	}
	for i := range c.Approvers {
		a := &c.Approvers[i]
		if u, err := url.Parse(a.URL); err != nil || u.Scheme != "https" || u.Host == "" || a.CA == "" {
			return fmt.Errorf("approver %d: an https url, and ca, a file with its certificate's CA, are expected", i+1)
		}
		below(&a.CA)
	}
	for _, d := range []struct {
		name, text string
		to         *time.Duration
		standard   time.Duration
	}{{"approver_hedge", c.ApproverHedge, &c.hedge, 100 * time.Millisecond}, {"approver_timeout", c.ApproverTimeout, &c.giveUp, 2 * time.Second}, {"issuer.kill_interval", c.Issuer.KillInterval, &c.Issuer.kills, 3 * time.Second}} {
		if *d.to = d.standard; d.text == "" {
			continue
		}
		v, err := time.ParseDuration(d.text)
		if err != nil || v < time.Millisecond || v > 20*time.Second {
			return fmt.Errorf("%s %.16q: 1ms to 20s is expected", d.name, d.text)
		}
		*d.to = v
	}
	c.mode = 0o666
	if c.SocketMode != "" {
		m, err := strconv.ParseUint(c.SocketMode, 8, 9)
		if err != nil {
			return fmt.Errorf("socket_mode %.16q: octal permissions such as \"0660\" are expected", c.SocketMode)
		}
		c.mode = os.FileMode(m)
	}
	if len(c.Agents) == 0 {
		return errors.New("agents is empty")
	}
	if len(c.Operators) == 0 {
		c.Operators = []CallerConfig{{User: "0"}, {User: strconv.Itoa(os.Geteuid())}}
	}
	for i := range c.Operators {
		o := &c.Operators[i]
		below(&o.Executable)
		if o.SPIFFEID != "" {
			return fmt.Errorf("operator %d: operators are on this host", i+1)
		}
		if err := o.validate(); err != nil {
			return fmt.Errorf("operator %d: %w", i+1, err)
		}
	}
	if c.Clock == nil {
		c.Clock = &ClockConfig{}
	}
	if err := c.Clock.validate(); err != nil {
		return err
	}
	if c.Remote != nil {
		if err := c.Remote.validate(below); err != nil {
			return err
		}
	}
	seen := make(map[string]bool)
	for i := range c.Agents {
		a := &c.Agents[i]
		if seen[a.Name] {
			return fmt.Errorf("agent %s stands twice", a.Name)
		}
		seen[a.Name] = true
		below(&a.ReferencePrices)
		below(&a.ReferenceKey)
		below(&a.Policy)
		if err := a.validate(below); err != nil {
			return fmt.Errorf("agent %.80q: %w", a.Name, err)
		}
		if c.TPM == "" && (a.Key == "" || a.TLSKey != "" || a.Cancels || a.Reserve || strings.Contains(a.Key, "pin-source=sealed:")) {
			return fmt.Errorf("agent %s: without a tpm the action key is in an HSM (key), there is no tls_key, no cancel_without_approver and no reserve, and the PIN is not sealed", a.Name)
		}
		for _, x := range a.Callers {
			if x.SPIFFEID != "" && (c.Remote == nil || !x.id.MemberOf(c.Remote.domain)) {
				return fmt.Errorf("agent %s: %s can never call: remote is not configured for its trust domain", a.Name, x.SPIFFEID)
			}
			if x.JWT && c.Remote.Audience == "" {
				return fmt.Errorf("agent %s: jwt needs remote.jwt_audience", a.Name)
			}
		}
	}
	return c.disjoint()
}

func (a *AgentConfig) validate(below func(*string)) error {
	if a.Name == "" || len(a.Name) > 63 || strings.Trim(a.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return errors.New("name: 1 to 63 lower-case letters, digits and dashes are expected")
	}
	a.lifetime = 30 * time.Second
	if a.StatementLifetime != "" {
		d, err := time.ParseDuration(a.StatementLifetime)
		if err != nil || d < time.Second || d > 5*time.Minute {
			return fmt.Errorf("statement_lifetime %.16q: 1s to 5m is expected", a.StatementLifetime)
		}
		a.lifetime = d
	}
	a.checkpoints = 10 * time.Minute
	if a.CheckpointEvery != "" {
		d, err := time.ParseDuration(a.CheckpointEvery)
		if err != nil || d < time.Second || d > 24*time.Hour {
			return fmt.Errorf("checkpoint_interval %.16q: 1s to 24h is expected", a.CheckpointEvery)
		}
		a.checkpoints = d
	}
	a.bindEvery = time.Second
	if a.RollbackInterval != "" {
		d, err := time.ParseDuration(a.RollbackInterval)
		if err != nil || d != 0 && (d < 10*time.Millisecond || d > time.Minute) {
			return fmt.Errorf("rollback_interval %.16q: 10ms to 1m is expected, or 0s for before each answer", a.RollbackInterval)
		}
		a.bindEvery = d
	}
	for name, uri := range map[string]string{"key": a.Key, "tls_key": a.TLSKey} {
		if uri != "" && !strings.HasPrefix(uri, "pkcs11:") {
			return fmt.Errorf("%s %.32q: a pkcs11: URI is expected; without one the key is in the TPM", name, uri)
		}
	}
	if a.Key != "" && a.Key == a.TLSKey {
		return errors.New("key and tls_key are one key, two are expected")
	}
	if a.KeyEvidence != "" && a.Key == "" {
		return errors.New("key_evidence is for a key in an HSM, which key names")
	}
	below(&a.KeyEvidence)
	if a.MaxConcurrent == 0 {
		a.MaxConcurrent = 64
	}
	if a.MaxConcurrent < 1 || a.MaxConcurrent > 4096 {
		return fmt.Errorf("max_concurrent %d: 1 to 4096 is expected", a.MaxConcurrent)
	}
	if a.ReferenceKey != "" && a.ReferencePrices == "" {
		return errors.New("reference_key is set, but reference_prices is not")
	}
	if len(a.Callers) == 0 {
		return errors.New("callers is empty, so nobody could act as it")
	}
	for i := range a.Callers {
		c := &a.Callers[i]
		below(&c.Executable)
		if err := c.validate(); err != nil {
			return fmt.Errorf("caller %d: %w", i+1, err)
		}
	}
	return nil
}

func (c *CallerConfig) validate() error {
	switch {
	case c.SPIFFEID != "":
		return c.validateRemote()
	case c.User == "":
		return errors.New("user is missing, or spiffe_id for a workload on another host")
	case len(c.Networks) > 0 || c.JWT:
		return errors.New("networks and jwt are for a caller with a spiffe_id")
	}
	if n, err := strconv.ParseUint(c.User, 10, 32); err == nil {
		c.uid = uint32(n)
	} else {
		u, err := user.Lookup(c.User)
		if err != nil {
			return fmt.Errorf("user %.64q: %w", c.User, err)
		}
		n, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return fmt.Errorf("user %s: uid %s", c.User, u.Uid)
		}
		c.uid = uint32(n)
	}
	switch {
	case c.Executable != "" && c.SHA256 != "":
		return errors.New("give executable or executable_sha256, not both")
	case c.Executable != "":
		b, err := os.ReadFile(c.Executable)
		if err != nil {
			return fmt.Errorf("executable: %w", err)
		}
		sum := sha256.Sum256(b)
		c.digest = &sum
	case c.SHA256 != "":
		b, err := hex.DecodeString(c.SHA256)
		if err != nil || len(b) != 32 {
			return errors.New("executable_sha256: 32 bytes in hex are expected")
		}
		c.digest = (*[32]byte)(b)
	}
	if c.Launcher && c.digest == nil {
		return errors.New("a launcher needs executable or executable_sha256: it is believed about the confinement of what it starts")
	}
	if c.Unit != "" && !strings.HasSuffix(c.Unit, ".service") && !strings.HasSuffix(c.Unit, ".scope") {
		return fmt.Errorf("unit %.64q: a name that ends in .service or .scope is expected", c.Unit)
	}
	return nil
}

// disjoint makes sure that no process could be two agents. A launcher names
// the agent that it starts, so it may be the launcher of several.
func (c *Config) disjoint() error {
	for i, a := range c.Agents {
		for _, b := range c.Agents[:i] {
			for _, x := range a.Callers {
				for _, y := range b.Callers {
					if x.SPIFFEID != "" || y.SPIFFEID != "" {
						if x.SPIFFEID != y.SPIFFEID {
							continue
						}
						return fmt.Errorf("agents %s and %s: %s could be both: give each workload an ID of its own", b.Name, a.Name, x.SPIFFEID)
					}
					differ := x.Launcher || y.Launcher || x.uid != y.uid ||
						x.digest != nil && y.digest != nil && *x.digest != *y.digest ||
						x.Unit != "" && y.Unit != "" && x.Unit != y.Unit
					if !differ {
						return fmt.Errorf("agents %s and %s: one process could be both: tell their callers apart by user, executable or unit", b.Name, a.Name)
					}
				}
			}
		}
	}
	return nil
}

// AgentFor returns the one agent that a caller may act as.
func (c *Config) agentFor(who *process) (string, bool) {
	for _, a := range c.Agents {
		for _, x := range a.Callers {
			if !x.Launcher && x.is(who) {
				return a.Name, true
			}
		}
	}
	return "", false
}

// launches says whether a caller may start the agent with this name.
func (c *Config) launches(who *process, agent string) bool {
	for _, a := range c.Agents {
		if a.Name == agent {
			return slices.ContainsFunc(a.Callers, func(x CallerConfig) bool { return x.Launcher && x.is(who) })
		}
	}
	return false
}

// is says whether a process on this host is one of this kind.
func (c *CallerConfig) is(who *process) bool {
	return c.SPIFFEID == "" && who.UID == c.uid && (c.digest == nil || *c.digest == who.Executable) && (c.Unit == "" || c.Unit == who.Unit)
}
