package approver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/postgres"
	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/verify/source"
)

// maxConfig bounds a configuration file, in bytes.
const maxConfig = 256 << 10

// Config is an approver's configuration file.
type Config struct {
	Listen           string        `json:"listen"`                         // host:port of the signers' API
	MetricsListen    string        `json:"metrics_listen,omitempty"`       // host:port; empty: none
	TrustDomain      string        `json:"trust_domain"`                   // of SPIFFE IDs
	Key              string        `json:"key"`                            // URI of the key that authorizes
	Certificate      string        `json:"certificate"`                    // PEM file of the TLS server, leaf first; read anew at each handshake
	CertificateKey   string        `json:"certificate_key"`                // PEM file
	CA               string        `json:"ca"`                             // PEM file with the issuer's CA certificate
	CRL              string        `json:"crl_url"`                        // the issuer's revocation list
	MaxRevocationAge string        `json:"max_revocation_age,omitempty"`   // 1h by default
	Kills            string        `json:"kills_url,omitempty"`            // the issuer's kill list; without it kills are known from agents' entries alone
	MaxKillAge       string        `json:"max_kill_age,omitempty"`         // 1m by default
	MaxAttestation   string        `json:"max_attestation_age,omitempty"`  // 24h by default
	Record           string        `json:"record"`                         // file of this approver's own record, or URL of the one that several share, see [OpenSharedRecord]
	PasswordFile     string        `json:"record_password_file,omitempty"` // file with the password of the database's user
	AcceptReference  bool          `json:"accept_reference,omitempty"`     // believe the signer about reference prices
	Regions          string        `json:"regions,omitempty"`              // geofeed or MMDB file, for scopes with source_regions; read again when it changes
	Agents           []AgentConfig `json:"agents"`

	maxRevocationAge, maxAttestation time.Duration
	maxKillAge                       time.Duration
	agents                           map[string]*AgentConfig // by SPIFFE ID
	regions                          source.Regions          // nil: there are none
}

// AgentConfig is an agent that the approver answers.
type AgentConfig struct {
	Name  string `json:"name"`
	Scope string `json:"scope,omitempty"` // YAML or JSON file: the certificate's scope must be inside this one
	// Reserve: what the agent may do while no approver answers is consented to in advance. Absent: nothing.
	Reserve *ReserveConfig `json:"reserve,omitempty"`

	ceiling *scope.Scope
}

// ReserveConfig bounds an agent's reserve.
type ReserveConfig struct {
	Scope string `json:"scope"` // YAML or JSON file: the scope of the reserve's certificate must be inside this one, which has a limit over time
	For   string `json:"for"`   // how long one consent serves, at most 15m

	ceiling *scope.Scope
	seconds int
}

func (r *ReserveConfig) validate() (err error) {
	if r.Scope == "" || r.For == "" {
		return errors.New("scope and for are expected")
	}
	d, err := time.ParseDuration(r.For)
	if err != nil || d < minReserve || d > attest.MaxReserve*time.Second || d%time.Second != 0 {
		return fmt.Errorf("for %.32q: whole seconds are expected, %s to %s", r.For, minReserve, attest.MaxReserve*time.Second)
	}
	r.seconds = int(d / time.Second)
	if r.ceiling, err = readScope(r.Scope); err != nil {
		return err
	}
	if !r.ceiling.BoundsOverTime() {
		return fmt.Errorf("%s: it has no limit over time: max_notional_per_window or max_orders_per_window is expected", r.Scope)
	}
	return nil
}

// minReserve is the shortest consent: a signer asks for the next one in time.
const minReserve = 10 * time.Second

func readScope(path string) (*scope.Scope, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s, err := scope.ParseYAML(b) // JSON is YAML
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// ParseConfig reads a configuration file, strictly. Relative paths are below dir.
func ParseConfig(b []byte, dir string) (*Config, error) {
	var c Config
	if err := strictjson.UnmarshalYAML(b, maxConfig, &c); err != nil {
		return nil, fmt.Errorf("approver configuration: %w", err)
	}
	if err := c.validate(dir); err != nil {
		return nil, fmt.Errorf("approver configuration: %w", err)
	}
	return &c, nil
}

func (c *Config) validate(dir string) error {
	for name, v := range map[string]string{"listen": c.Listen, "trust_domain": c.TrustDomain, "key": c.Key, "certificate": c.Certificate, "certificate_key": c.CertificateKey, "ca": c.CA, "crl_url": c.CRL, "record": c.Record} {
		if v == "" {
			return fmt.Errorf("%s is missing", name)
		}
	}
	if !certext.ValidTrustDomain(c.TrustDomain) {
		return fmt.Errorf("trust_domain %.80q: a name such as example.org is expected", c.TrustDomain)
	}
	below := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for _, p := range []*string{&c.Certificate, &c.CertificateKey, &c.CA, &c.PasswordFile, &c.Regions} {
		below(p)
	}
	if postgres.IsURL(c.Record) {
		if _, err := postgres.Parse("record", c.Record); err != nil {
			return err
		}
	} else if below(&c.Record); c.PasswordFile != "" {
		return errors.New("record_password_file is for a record in PostgreSQL")
	}
	for _, d := range []struct {
		name, text    string
		to            *time.Duration
		standard, max time.Duration
	}{
		{"max_revocation_age", c.MaxRevocationAge, &c.maxRevocationAge, time.Hour, 7 * 24 * time.Hour},
		{"max_kill_age", c.MaxKillAge, &c.maxKillAge, time.Minute, time.Hour},
		{"max_attestation_age", c.MaxAttestation, &c.maxAttestation, 24 * time.Hour, 24 * time.Hour},
	} {
		if *d.to = d.standard; d.text == "" {
			continue
		}
		v, err := time.ParseDuration(d.text)
		if err != nil || v <= 0 || v > d.max {
			return fmt.Errorf("%s %.32q: a duration of at most %s is expected", d.name, d.text, d.max)
		}
		*d.to = v
	}
	if c.Regions != "" {
		regions, err := source.Open(c.Regions)
		if err != nil {
			return fmt.Errorf("regions: %w", err)
		}
		c.regions = regions
	}
	if len(c.Agents) == 0 {
		return errors.New("agents is empty, so nothing would be approved")
	}
	c.agents = make(map[string]*AgentConfig)
	for i := range c.Agents {
		a := &c.Agents[i]
		if a.Name == "" || len(a.Name) > 63 || strings.Trim(a.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return fmt.Errorf("agent %.80q: 1 to 63 lower-case letters, digits and dashes are expected", a.Name)
		}
		id := "spiffe://" + c.TrustDomain + "/agent/" + a.Name
		if c.agents[id] != nil {
			return fmt.Errorf("agent %s stands twice", a.Name)
		}
		c.agents[id] = a
		if a.Reserve != nil {
			below(&a.Reserve.Scope)
			if err := a.Reserve.validate(); err != nil {
				return fmt.Errorf("agent %s: reserve: %w", a.Name, err)
			}
		}
		if a.Scope == "" {
			continue
		}
		below(&a.Scope)
		var err error
		if a.ceiling, err = readScope(a.Scope); err != nil {
			return fmt.Errorf("agent %s: %w", a.Name, err)
		}
	}
	return nil
}

// OpenRecord opens the record that the configuration names. Close it.
func (c *Config) OpenRecord(ctx context.Context) (*Record, error) {
	if postgres.IsURL(c.Record) {
		return OpenSharedRecord(ctx, c.Record, c.PasswordFile)
	}
	return OpenRecord(ctx, c.Record)
}

// RevocationAge is how old a revocation list may be.
func (c *Config) RevocationAge() time.Duration { return c.maxRevocationAge }
