// Package issuer certifies agents' keys: [New] makes an [Issuer] from its
// configuration and CA key, [Issuer.Serve] serves its interfaces. A
// certificate for an agent is issued only after attest has appraised the
// evidence of the device that the inventory ties to the agent.
package issuer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/durable"
	"inkan/internal/strictjson"
	"inkan/verify/source"
)

// maxRequest bounds a request's body, in bytes.
const maxRequest = 128 << 10

// Config is an issuer's configuration file, issuer.yaml in its directory.
type Config struct {
	TrustDomain   string   `json:"trust_domain"`             // of SPIFFE IDs
	CAKey         string   `json:"ca_key"`                   // key URI
	PolicyKey     string   `json:"policy_key"`               // key URI; for inkan issuer policy approve, never used by the server
	AgentListen   string   `json:"agent_listen"`             // host:port of the agents' API
	AdminListen   string   `json:"admin_listen"`             // host:port of the administrators' API
	PublicListen  string   `json:"public_listen"`            // host:port of CRL, OCSP and CA certificate
	MetricsListen string   `json:"metrics_listen,omitempty"` // host:port of metrics and health; empty: none
	PublicURL     string   `json:"public_url"`               // how the world reaches PublicListen; stands in certificates
	ServerNames   []string `json:"server_names"`             // DNS names and addresses in the servers' certificate
	Lifetime      string   `json:"lifetime"`                 // of agents' certificates, at most 24h
	CRLLifetime   string   `json:"crl_lifetime"`             // until a CRL's next update

	// Regions is a geofeed or MMDB file that says where addresses are, for scopes
	// with source_regions; read again when it changes. Relative: below the issuer's directory.
	Regions string `json:"regions,omitempty"`

	lifetime, crlLifetime time.Duration
}

// ParseConfig reads a configuration file, strictly.
func ParseConfig(b []byte) (*Config, error) {
	var c Config
	if err := strictjson.UnmarshalYAML(b, maxRequest, &c); err != nil {
		return nil, fmt.Errorf("issuer.yaml: %w", err)
	}
	return &c, c.validate()
}

func (c *Config) validate() error {
	if !certext.ValidTrustDomain(c.TrustDomain) {
		return fmt.Errorf("issuer.yaml: trust_domain %.80q: a name such as example.org is expected", c.TrustDomain)
	}
	for name, v := range map[string]string{"ca_key": c.CAKey, "agent_listen": c.AgentListen, "admin_listen": c.AdminListen, "public_listen": c.PublicListen} {
		if v == "" {
			return fmt.Errorf("issuer.yaml: %s is missing", name)
		}
	}
	if len(c.ServerNames) == 0 {
		return errors.New("issuer.yaml: server_names is empty: agents could not verify this server")
	}
	if u, err := url.Parse(c.PublicURL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.HasSuffix(c.PublicURL, "/") {
		return fmt.Errorf("issuer.yaml: public_url %.80q: an http URL without a slash at its end is expected", c.PublicURL)
	}
	var err error
	if c.lifetime, err = time.ParseDuration(c.Lifetime); err != nil || c.lifetime < 2*time.Minute || c.lifetime > certext.MaxLifetime {
		return fmt.Errorf("issuer.yaml: lifetime %.32q: 2m to %s is expected", c.Lifetime, certext.MaxLifetime)
	}
	if c.crlLifetime, err = time.ParseDuration(c.CRLLifetime); err != nil || c.crlLifetime < time.Minute || c.crlLifetime > 7*24*time.Hour {
		return fmt.Errorf("issuer.yaml: crl_lifetime %.32q: 1m to 168h is expected", c.CRLLifetime)
	}
	return nil
}

// Names of files in an issuer's directory.
const (
	ConfigFile    = "issuer.yaml"
	CAFile        = "ca.pem"
	CAKeyFile     = "ca.key"
	PolicyFile    = "policy.pub.pem" // the policy key's public half
	PolicyKeyFile = "policy.key"
	AdminFile     = "admin.pem"
	AdminKeyFile  = "admin.key"
	inventoryFile = "inventory.db"
)

// Issuer is an issuer's state. It is safe for concurrent use.
type Issuer struct {
	config    *Config
	key       crypto.Signer // of the CA
	ca        *x509.Certificate
	policyKey []byte // TPMT_PUBLIC
	policyRef []byte
	auth      map[string][]byte // authPolicy of agents' keys, by mode
	regions   source.Regions    // nil: there are none
	epochAuth map[string][]byte // likewise, on devices that have epochs
	store     *store
	log       *slog.Logger
	now       func() time.Time
	metrics   *metrics

	sessions *sessions
	limit    limiter
	mu       sync.Mutex // guards what follows
	crl      []byte
	crlMade  time.Time
	crlUntil time.Time

	killList      string
	killListMade  time.Time
	killListUntil time.Time
	lastNumber    int64 // of a list
	reserved      int64 // numbers up to here are used up after a restart
	ocsp          *responder
	server        *serverCertificate
}

// New opens the issuer in dir with its CA key. Close it.
func New(ctx context.Context, dir string, c *Config, key crypto.Signer, log *slog.Logger) (*Issuer, error) {
	return open(ctx, dir, c, key, log, false)
}

func open(ctx context.Context, dir string, c *Config, key crypto.Signer, log *slog.Logger, create bool) (*Issuer, error) {
	i := &Issuer{config: c, key: key, log: log, now: time.Now, policyRef: attest.PolicyRef(c.TrustDomain), auth: make(map[string][]byte), epochAuth: make(map[string][]byte), metrics: newMetrics()}
	i.sessions, i.limit = newSessions(), limiter{rate: perAddressRate, burst: perAddressBurst}
	var err error
	if i.ca, err = readCertificate(filepath.Join(dir, CAFile)); err != nil {
		return nil, err
	}
	if k, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(i.ca.PublicKey) {
		return nil, fmt.Errorf("%s is not for the key that ca_key names", CAFile)
	}
	policy, err := readPolicyKey(filepath.Join(dir, PolicyFile))
	if err != nil {
		return nil, err
	}
	if i.policyKey, err = attest.PolicyKeyPublic(policy); err != nil {
		return nil, err
	}
	for _, mode := range attest.Modes {
		if i.auth[mode], err = attest.KeyPolicy(mode, i.policyKey, i.policyRef); err != nil {
			return nil, err
		}
		if i.epochAuth[mode], err = attest.EpochKeyPolicy(mode, i.policyKey, i.policyRef); err != nil {
			return nil, err
		}
	}
	if c.Regions != "" {
		path := c.Regions
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if i.regions, err = source.Open(path); err != nil {
			return nil, fmt.Errorf("issuer.yaml: regions: %w", err)
		}
	}
	if i.store, err = openStore(ctx, filepath.Join(dir, inventoryFile), create); err != nil {
		return nil, err
	}
	if i.reserved, err = i.store.reserved(ctx); err != nil {
		return nil, errors.Join(err, i.Close())
	}
	i.lastNumber = i.reserved
	i.ocsp, i.server = &responder{issuer: i}, &serverCertificate{issuer: i}
	return i, nil
}

// Close closes the inventory.
func (i *Issuer) Close() error { return i.store.db.Close() }

// CA returns the CA certificate.
func (i *Issuer) CA() *x509.Certificate { return i.ca }

func readCertificate(path string) (*x509.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := attest.ParseCertificates(b)
	if err != nil || len(list) != 1 {
		return nil, fmt.Errorf("%s: one certificate in PEM is expected", path)
	}
	return list[0], nil
}

func readPolicyKey(path string) (*ecdsa.PublicKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("%s: a PUBLIC KEY in PEM is expected", path)
	}
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	e, ok := k.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%s: a P-256 key is expected", path)
	}
	return e, nil
}

// caLifetime is how long a CA certificate made by Init lives.
var caLifetime = 10 * 365 * 24 * time.Hour

// adminLifetime is how long an administrator's certificate lives.
const adminLifetime = 365 * 24 * time.Hour

// Init writes a new issuer's directory: configuration, CA certificate, the
// policy key's public half, and an administrator's certificate for adminKey.
// The private keys are the caller's to keep.
func Init(ctx context.Context, dir string, yaml []byte, name string, key crypto.Signer, policy, admin crypto.PublicKey, log *slog.Logger) error {
	c, err := ParseConfig(yaml)
	if err != nil {
		return err
	}
	p, ok := policy.(*ecdsa.PublicKey)
	if !ok {
		return errors.New("policy key: P-256 is expected")
	}
	if _, err := attest.PolicyKeyPublic(p); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := selfSigned(name, key)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(policy)
	if err != nil {
		return err
	}
	for file, b := range map[string][]byte{
		CAFile: certificatePEM(ca), PolicyFile: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}),
	} {
		if err := durable.WriteFile(filepath.Join(dir, file), b, 0o644); err != nil {
			return err
		}
	}
	i, err := open(ctx, dir, c, key, log, true)
	if err != nil {
		return err
	}
	crt, err := i.CertifyAdministrator(ctx, "administrator", admin)
	if err == nil {
		err = durable.WriteFile(filepath.Join(dir, AdminFile), crt, 0o644)
	}
	if err == nil { // last: with it the directory has an issuer
		err = durable.WriteFile(filepath.Join(dir, ConfigFile), yaml, 0o644)
	}
	return errors.Join(err, i.Close())
}

// CertifyAdministrator certifies an administrator's key for a year, in PEM. It
// takes the CA's key, so it is for who has that, and no API offers it.
func (i *Issuer) CertifyAdministrator(ctx context.Context, name string, key crypto.PublicKey) ([]byte, error) {
	if !validID(name) {
		return nil, fmt.Errorf("administrator's name %.80q: %s", name, idRule)
	}
	crt, err := i.issue(ctx, order{profile: profileAdmin, key: key, common: name, lifetime: adminLifetime})
	if err != nil {
		return nil, err
	}
	return certificatePEM(crt.Raw), nil
}

func certificatePEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// selfSigned makes the CA's own certificate. issue makes all others.
func selfSigned(name string, key crypto.Signer) ([]byte, error) {
	if name == "" || len(name) > 64 {
		return nil, errors.New("CA name: 1 to 64 characters are expected")
	}
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return nil, err
	}
	serial[0] = serial[0]&0x7f | 0x40
	ski, err := keyID(key.Public())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(caLifetime), SubjectKeyId: ski,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, MaxPathLenZero: true, BasicConstraintsValid: true,
	}
	return x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
}

func serialText(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }
