package issuer

import (
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"inkan/attest"
	"inkan/internal/sqlite"
	"inkan/internal/strictjson"
	"inkan/scope"
)

const schemaVersion = 3

// One EK is one device, and one device has one AK (E9): the database holds that.
const schema = `
CREATE TABLE device(
	id            TEXT PRIMARY KEY,
	ek            BLOB NOT NULL UNIQUE,  -- SHA-256 of the SPKI; without a TPM that of the one key, in an HSM, that is certified for it
	unattested    INTEGER NOT NULL,      -- the host has no TPM
	roots         TEXT NOT NULL,         -- PEM; empty: the EK is pinned
	intermediates TEXT NOT NULL,
	crls          TEXT NOT NULL,         -- PEM of the vendor's; empty: it publishes none
	allow_expired INTEGER NOT NULL,
	unsafe_clock  INTEGER NOT NULL,
	min_firmware  INTEGER NOT NULL,
	ak            BLOB UNIQUE,           -- TPMT_PUBLIC, from the first accepted evidence on
	srk           BLOB,
	clock_ms      INTEGER, resets INTEGER, restarts INTEGER,
	epoch_min     INTEGER NOT NULL DEFAULT 0, -- that the epoch counter must have; 0: the device has no epochs
	epoch         INTEGER NOT NULL DEFAULT 0, -- that it had at the last accepted evidence
	audit         INTEGER,               -- the TPM's audit counter then; NULL: it gave no testimony yet
	testimony     BLOB,                  -- the SHA-256 of that testimony, which the next one is held against
	created       INTEGER NOT NULL
) STRICT;
CREATE TABLE agent(
	name    TEXT PRIMARY KEY,
	device  TEXT NOT NULL REFERENCES device(id),
	scope   BLOB NOT NULL,               -- canonical JSON
	tls     INTEGER NOT NULL,            -- a TLS key too: 1 in the TPM, 2 in an HSM
	hsm     INTEGER NOT NULL,            -- the action key is in an HSM
	approver INTEGER NOT NULL,           -- the action key is in approver mode
	cancels INTEGER NOT NULL DEFAULT 0,  -- and there is another one, in local mode, for cancels alone
	reserve TEXT NOT NULL DEFAULT '',    -- scope of another one, in reserve mode, canonical JSON; empty: there is none
	vendor  TEXT NOT NULL,               -- format of the evidence that an HSM's maker must give; empty: none
	vendor_roots TEXT NOT NULL,          -- PEM
	status  TEXT NOT NULL CHECK (status IN ('active', 'suspended', 'retired')),
	created INTEGER NOT NULL
) STRICT;
CREATE TABLE policy(
	name     TEXT PRIMARY KEY,
	device   TEXT NOT NULL,              -- * is for all
	document BLOB NOT NULL,
	retired  INTEGER NOT NULL,
	created  INTEGER NOT NULL
) STRICT;
CREATE TABLE certificate(
	serial    TEXT PRIMARY KEY,          -- hex
	profile   TEXT NOT NULL,
	agent     TEXT NOT NULL,             -- empty where there is none
	der       BLOB NOT NULL,
	issued    INTEGER NOT NULL,
	not_after INTEGER NOT NULL,
	revoked   INTEGER,
	reason    INTEGER                    -- RFC 5280, section 5.3.1
) STRICT;
CREATE INDEX certificate_agent ON certificate(agent, not_after);
CREATE INDEX certificate_revoked ON certificate(revoked) WHERE revoked IS NOT NULL;
CREATE TABLE event(
	id       INTEGER PRIMARY KEY,
	time     INTEGER NOT NULL,           -- microseconds since 1970
	kind     TEXT NOT NULL,
	agent    TEXT NOT NULL,
	device   TEXT NOT NULL,
	check_id TEXT NOT NULL,
	detail   TEXT NOT NULL,
	evidence TEXT NOT NULL               -- SHA-256, hex
) STRICT;
CREATE TABLE kill(
	id     TEXT PRIMARY KEY,
	scope  TEXT NOT NULL,
	agent  TEXT NOT NULL,                -- SPIFFE ID; empty: all
	venue  TEXT NOT NULL,
	reason TEXT NOT NULL,
	since  INTEGER NOT NULL,
	lifted INTEGER
) STRICT;
CREATE TABLE evidence(
	sha256   TEXT PRIMARY KEY,
	document BLOB NOT NULL
) STRICT;
`

// additions came after the format: a program of before does without them.
const additions = `
CREATE TABLE IF NOT EXISTS list_number(
	one      INTEGER PRIMARY KEY CHECK (one = 1),
	reserved INTEGER NOT NULL            -- CRLs and kill lists may have had numbers up to here
) STRICT;
`

// Errors of the inventory.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists already")
	ErrInvalid  = errors.New("not valid")
)

// Device is a TPM in the inventory.
type Device struct {
	ID            string `json:"id"`
	EK            string `json:"ek"`                      // SHA-256 of the EK's SPKI, hex
	Roots         string `json:"roots,omitempty"`         // PEM of the vendor's roots; empty: the EK is pinned
	Intermediates string `json:"intermediates,omitempty"` // PEM
	CRLs          string `json:"crls,omitempty"`          // PEM of the vendor's revocation lists: then a current one is demanded
	AllowExpired  bool   `json:"allow_expired,omitzero"`  // of the EK certificate
	UnsafeClock   bool   `json:"unsafe_clock,omitzero"`   // accept a clock after a loss of power
	MinFirmware   int64  `json:"min_firmware,omitzero"`
	// Unattested says that the host has no TPM: nothing is proven of it, and EK is
	// the SHA-256 of the SPKI of the one key, in an HSM, that may be certified.
	Unattested bool   `json:"unattested,omitzero"`
	Enrolled   bool   `json:"enrolled,omitzero"`  // it has an AK on record; output only
	EpochMin   uint64 `json:"epoch_min,omitzero"` // that its epoch counter must have; 0: it has no epochs; output only
	Epoch      uint64 `json:"epoch,omitzero"`     // that it had at the last accepted evidence; output only
	ak, srk    []byte
	clock      *attest.Clock
	audit      *uint64
	testimony  []byte
}

// Agent is an agent in the inventory.
type Agent struct {
	Name     string `json:"name"`
	Device   string `json:"device"`
	Scope    string `json:"scope"`                            // JSON; canonical in output
	TLS      bool   `json:"tls,omitzero"`                     // wants a TLS certificate too
	TLSHSM   bool   `json:"tls_hsm,omitzero"`                 // likewise, with the TLS key in an HSM of the host
	HSM      bool   `json:"hsm,omitzero"`                     // its action key is in an HSM of the host, not in the TPM
	Approver bool   `json:"approver,omitzero"`                // its action key is in approver mode, and it has a TLS certificate
	Cancels  bool   `json:"cancel_without_approver,omitzero"` // with Approver: besides it has a key in local mode that is certified for cancels alone
	Reserve  string `json:"reserve,omitzero"`                 // with Approver: JSON of the scope that a key in reserve mode is certified for; canonical in output
	Status   string `json:"status,omitzero"`                  // active, suspended, retired

	Vendor      string `json:"vendor,omitzero"`       // with HSM: the format of the evidence that the HSM's maker must give, or empty
	VendorRoots string `json:"vendor_roots,omitzero"` // PEM, that its evidence must lead to
}

// Statuses of agents.
const (
	Active    = "active"
	Suspended = "suspended"
	Retired   = "retired"
)

// Policy is an approved policy and the devices that may use it.
type Policy struct {
	Device   string                `json:"device"` // * is for all
	Approved attest.ApprovedPolicy `json:"approved"`
	Retired  bool                  `json:"retired,omitzero"`
}

// Certificate is one that was issued.
type Certificate struct {
	Serial   string    `json:"serial"`
	Profile  string    `json:"profile"`
	Agent    string    `json:"agent,omitempty"`
	Issued   time.Time `json:"issued"`
	NotAfter time.Time `json:"not_after"`
	Revoked  time.Time `json:"revoked,omitzero"`
	Reason   string    `json:"reason,omitempty"`
	der      []byte
}

// Event is a line of the decision log.
type Event struct {
	ID       int64     `json:"id"`
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"` // refused, appraised, declared, unaccounted, issued, revoked, changed
	Agent    string    `json:"agent,omitempty"`
	Device   string    `json:"device,omitempty"`
	Check    string    `json:"check,omitempty"` // what decided
	Detail   string    `json:"detail,omitempty"`
	Evidence string    `json:"evidence,omitempty"` // SHA-256
}

type store struct{ db *sql.DB }

// openStore opens the inventory. An empty one knows of no revocation, so that
// one is made only where it is asked for.
func openStore(ctx context.Context, path string, create bool) (_ *store, err error) {
	if _, err := os.Stat(path); err != nil && !create {
		return nil, fmt.Errorf("opening the inventory: %w: bring back a copy of it, without which what was revoked would be good again", err)
	}
	db, err := sqlite.Open(path, "foreign_keys(1)")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = db.Close()
			err = fmt.Errorf("opening the inventory %s: %w", path, err)
		}
	}()
	db.SetMaxOpenConns(1) // SQLite has one writer; waiting here is cheaper than in the file
	var version int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return nil, err
	}
	switch version {
	case 0:
		if !create {
			return nil, errors.New("it is empty: bring back a copy of it, without which what was revoked would be good again")
		}
		if _, err := db.ExecContext(ctx, fmt.Sprintf("BEGIN IMMEDIATE; %s PRAGMA user_version = %d; COMMIT", schema, schemaVersion)); err != nil {
			return nil, err
		}
	case schemaVersion:
	case 2: // before agents had a reserve
		if _, err := db.ExecContext(ctx, fmt.Sprintf("BEGIN IMMEDIATE; ALTER TABLE agent ADD COLUMN reserve TEXT NOT NULL DEFAULT ''; PRAGMA user_version = %d; COMMIT", schemaVersion)); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("it has format %d, this program knows %d", version, schemaVersion)
	}
	if _, err := db.ExecContext(ctx, additions); err != nil {
		return nil, err
	}
	// Unreleased programs had the same format with fewer columns.
	for _, q := range []string{"SELECT " + deviceColumns + " FROM device", "SELECT " + agentColumns + " FROM agent", "SELECT " + certificateColumns + " FROM certificate"} {
		s, err := db.PrepareContext(ctx, q)
		if err != nil {
			return nil, fmt.Errorf("it was made by another program, which was not released: %w", err)
		}
		_ = s.Close() // it read nothing
	}
	return &store{db}, os.Chmod(path, 0o600)
}

// reserve keeps the highest number that a list may have from now on.
func (s *store) reserve(ctx context.Context, n int64) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO list_number(one, reserved) VALUES(1, ?) ON CONFLICT(one) DO UPDATE SET reserved = max(reserved, excluded.reserved)", n)
		return err
	})
}

func (s *store) reserved(ctx context.Context) (n int64, err error) {
	err = s.db.QueryRowContext(ctx, "SELECT coalesce(max(reserved), 0) FROM list_number").Scan(&n)
	return n, err
}

// inTx runs f in one durable transaction.
func (s *store) inTx(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, ignoreDone(tx.Rollback()))
	}
	return tx.Commit()
}

func ignoreDone(err error) error {
	if errors.Is(err, sql.ErrTxDone) {
		return nil
	}
	return err
}

// byKey is the key in a context under which the name of the administrator stands who asked.
type byKey struct{}

func event(ctx context.Context, tx *sql.Tx, e Event) error {
	if name, ok := ctx.Value(byKey{}).(string); ok {
		e.Detail += ", by " + name
	}
	_, err := tx.ExecContext(ctx, "INSERT INTO event(time, kind, agent, device, check_id, detail, evidence) VALUES(?, ?, ?, ?, ?, ?, ?)",
		e.Time.UnixMicro(), e.Kind, e.Agent, e.Device, e.Check, e.Detail, e.Evidence)
	return err
}

// constraint turns a violated constraint into ErrExists or ErrNotFound.
func constraint(err error, what string) error {
	if err == nil {
		return nil
	}
	switch text := err.Error(); {
	case strings.Contains(text, "UNIQUE"):
		return fmt.Errorf("%s: %w", what, ErrExists)
	case strings.Contains(text, "FOREIGN KEY"):
		return fmt.Errorf("%s: what it refers to is %w", what, ErrNotFound)
	}
	return err
}

func validID(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

const idRule = "1 to 63 lower-case letters, digits and inner dashes are expected"

func (s *store) addDevice(ctx context.Context, d Device, now time.Time) error {
	ek, err := hex.DecodeString(d.EK)
	switch {
	case !validID(d.ID):
		return fmt.Errorf("device id %.80q: %w: %s", d.ID, ErrInvalid, idRule)
	case err != nil || len(ek) != 32:
		return fmt.Errorf("device %s: ek: %w: the SHA-256 of the EK's SPKI in hex is expected; inkan tpm info shows it", d.ID, ErrInvalid)
	case d.MinFirmware < 0:
		return fmt.Errorf("device %s: min_firmware: %w", d.ID, ErrInvalid)
	case d.Unattested && (d.Roots != "" || d.Intermediates != "" || d.CRLs != "" || d.AllowExpired || d.UnsafeClock || d.MinFirmware != 0):
		return fmt.Errorf("device %s: %w: a host without a TPM has its key's SHA-256 and nothing of a TPM", d.ID, ErrInvalid)
	}
	if d.Roots == "" && (d.Intermediates != "" || d.CRLs != "" || d.AllowExpired) {
		return fmt.Errorf("device %s: %w: its EK is pinned, so no certificate of it is asked, and intermediates, revocation lists and expired certificates stand for nothing: give roots with them", d.ID, ErrInvalid)
	}
	for name, pem := range map[string]string{"roots": d.Roots, "intermediates": d.Intermediates} {
		if pem == "" {
			continue
		}
		if _, err := attest.ParseCertificates([]byte(pem)); err != nil {
			return fmt.Errorf("device %s: %s: %w: %w", d.ID, name, ErrInvalid, err)
		}
	}
	if d.CRLs != "" {
		if _, err := attest.ParseCRLs([]byte(d.CRLs)); err != nil {
			return fmt.Errorf("device %s: crls: %w: %w", d.ID, ErrInvalid, err)
		}
	}
	return s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO device(id, ek, unattested, roots, intermediates, crls, allow_expired, unsafe_clock, min_firmware, created) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
			d.ID, ek, d.Unattested, d.Roots, d.Intermediates, d.CRLs, d.AllowExpired, d.UnsafeClock, d.MinFirmware, now.Unix())
		if err != nil && strings.Contains(err.Error(), "device.ek") {
			var other string
			if err := tx.QueryRowContext(ctx, "SELECT id FROM device WHERE ek = ?", ek).Scan(&other); err != nil {
				return err
			}
			return fmt.Errorf("device %s: its key is that of the device %s, which %w: one key is one device", d.ID, other, ErrExists)
		}
		if err := constraint(err, "device "+d.ID); err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Device: d.ID, Detail: "device added"})
	})
}

const deviceColumns = "id, ek, unattested, roots, intermediates, crls, allow_expired, unsafe_clock, min_firmware, ak, srk, clock_ms, resets, restarts, epoch_min, epoch, audit, testimony"

func scanDevice(row interface{ Scan(...any) error }) (*Device, error) {
	var d Device
	var ek []byte
	var ms, resets, restarts, audit sql.NullInt64
	if err := row.Scan(&d.ID, &ek, &d.Unattested, &d.Roots, &d.Intermediates, &d.CRLs, &d.AllowExpired, &d.UnsafeClock, &d.MinFirmware, &d.ak, &d.srk, &ms, &resets, &restarts, &d.EpochMin, &d.Epoch, &audit, &d.testimony); err != nil {
		return nil, err
	}
	d.EK, d.Enrolled = hex.EncodeToString(ek), d.ak != nil
	if audit.Valid {
		n := uint64(audit.Int64)
		d.audit = &n
	}
	if ms.Valid {
		d.clock = &attest.Clock{Milliseconds: uint64(ms.Int64), Resets: uint32(resets.Int64), Restarts: uint32(restarts.Int64)}
	}
	return &d, nil
}

// queryer is a database, or a transaction in it.
type queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

func (s *store) device(ctx context.Context, id string) (*Device, error) {
	return deviceIn(ctx, s.db, id)
}

func deviceIn(ctx context.Context, q queryer, id string) (*Device, error) {
	d, err := scanDevice(q.QueryRowContext(ctx, "SELECT "+deviceColumns+" FROM device WHERE id = ?", id))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, ErrNotFound
	}
	return d, err
}

// same says whether d is what an operator entered as old, and not another
// device that has its name by now.
func (d *Device) same(old *Device) bool {
	return d.EK == old.EK && d.Roots == old.Roots && d.Intermediates == old.Intermediates && d.CRLs == old.CRLs && d.Unattested == old.Unattested &&
		d.AllowExpired == old.AllowExpired && d.UnsafeClock == old.UnsafeClock && d.MinFirmware == old.MinFirmware
}

func (s *store) deviceByEK(ctx context.Context, ek [32]byte) (*Device, error) {
	d, err := scanDevice(s.db.QueryRowContext(ctx, "SELECT "+deviceColumns+" FROM device WHERE ek = ?", ek[:]))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, ErrNotFound
	}
	return d, err
}

// list runs a query and scans each row.
func list[T any](ctx context.Context, db queryer, scan func(*sql.Rows) (T, error), query string, args ...any) ([]T, error) {
	rows, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := []T{}
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

func (s *store) devices(ctx context.Context) ([]*Device, error) {
	return list(ctx, s.db, func(r *sql.Rows) (*Device, error) { return scanDevice(r) }, "SELECT "+deviceColumns+" FROM device ORDER BY id")
}

// removeDevice takes a device out of the inventory; its agents must be retired.
// Their certificates are revoked.
func (s *store) removeDevice(ctx context.Context, id string, now time.Time) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		var active int
		if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM agent WHERE device = ? AND status <> 'retired'", id).Scan(&active); err != nil {
			return err
		}
		if active > 0 {
			return fmt.Errorf("device %s: %w: it has %d agents that are not retired", id, ErrInvalid, active)
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM agent WHERE device = ?", id); err != nil {
			return err
		}
		res, err := tx.ExecContext(ctx, "DELETE FROM device WHERE id = ?", id)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil {
			return err
		} else if n != 1 {
			return fmt.Errorf("device %s: %w", id, ErrNotFound)
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Device: id, Detail: "device removed"})
	})
}

func (s *store) addAgent(ctx context.Context, a Agent, now time.Time) error {
	sc, err := scope.Parse([]byte(a.Scope))
	if err != nil {
		return fmt.Errorf("agent %.80s: %w: %w", a.Name, ErrInvalid, err)
	}
	if a.HSM && a.Approver {
		return fmt.Errorf("agent %.80s: %w: a key in an HSM cannot be in approver mode: only a TPM demands authorizations", a.Name, ErrInvalid)
	}
	reserve, err := a.validReserve(sc)
	if err != nil {
		return fmt.Errorf("agent %.80s: reserve: %w: %w", a.Name, ErrInvalid, err)
	}
	tls := 0
	switch {
	case a.Cancels && !a.Approver:
		return fmt.Errorf("agent %.80s: %w: a key for cancels alone stands beside a key in approver mode", a.Name, ErrInvalid)
	case a.TLSHSM && a.Approver:
		return fmt.Errorf("agent %.80s: %w: approvers know an agent by a TLS key in the TPM", a.Name, ErrInvalid)
	case a.TLSHSM:
		tls = 2
	case a.TLS:
		tls = 1
	}
	if err := a.validVendor(); err != nil {
		return fmt.Errorf("agent %.80s: %w: %w", a.Name, ErrInvalid, err)
	}
	if !validID(a.Name) {
		return fmt.Errorf("agent name %.80q: %w: %s", a.Name, ErrInvalid, idRule)
	}
	return s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO agent(name, device, scope, tls, hsm, approver, cancels, reserve, vendor, vendor_roots, status, created) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", a.Name, a.Device, sc.Canonical(), tls, a.HSM, a.Approver, a.Cancels, reserve, a.Vendor, a.VendorRoots, Active, now.Unix())
		if err := constraint(err, "agent "+a.Name); errors.Is(err, ErrNotFound) {
			return fmt.Errorf("agent %s: its device %.80q is %w in the inventory", a.Name, a.Device, ErrNotFound)
		} else if err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Agent: a.Name, Device: a.Device, Detail: "agent added"})
	})
}

// validReserve returns the canonical scope of the agent's reserve: what is
// consented to in advance is bounded, and inside the agent's scope.
func (a *Agent) validReserve(outer *scope.Scope) (string, error) {
	if a.Reserve == "" {
		return "", nil
	}
	if !a.Approver {
		return "", errors.New("it stands beside a key in approver mode")
	}
	inner, err := scope.Parse([]byte(a.Reserve))
	if err != nil {
		return "", err
	}
	if err := scope.Contains(outer, inner); err != nil {
		return "", fmt.Errorf("its scope is wider than the agent's: %w", err)
	}
	if !inner.BoundsOverTime() {
		return "", errors.New("its scope has no limit over time: max_notional_per_window or max_orders_per_window is expected")
	}
	return string(inner.Canonical()), nil
}

// validVendor: a vendor's evidence needs its roots, and an HSM.
func (a *Agent) validVendor() error {
	switch {
	case a.Vendor == "" && a.VendorRoots == "":
		return nil
	case !a.HSM:
		return errors.New("a vendor's evidence is for a key in an HSM")
	case a.Vendor != attest.VendorYubiHSM2 && a.Vendor != attest.VendorPKIX:
		return fmt.Errorf("vendor %.16q: %s or %s is expected", a.Vendor, attest.VendorYubiHSM2, attest.VendorPKIX)
	}
	if _, err := attest.ParseCertificates([]byte(a.VendorRoots)); err != nil {
		return fmt.Errorf("the roots of the vendor's evidence: %w", err)
	}
	return nil
}

// vendorRoots returns the roots as a pool; nil where there are none.
func (a *Agent) vendorRoots() *x509.CertPool {
	list, err := attest.ParseCertificates([]byte(a.VendorRoots))
	if a.Vendor == "" || err != nil {
		return nil // without roots nothing is accepted
	}
	p := x509.NewCertPool()
	for _, c := range list {
		p.AddCert(c)
	}
	return p
}

const agentColumns = "name, device, scope, tls, hsm, approver, cancels, reserve, vendor, vendor_roots, status"

func scanAgent(row interface{ Scan(...any) error }) (*Agent, error) {
	var a Agent
	var sc []byte
	var tls int
	err := row.Scan(&a.Name, &a.Device, &sc, &tls, &a.HSM, &a.Approver, &a.Cancels, &a.Reserve, &a.Vendor, &a.VendorRoots, &a.Status)
	a.Scope, a.TLS, a.TLSHSM = string(sc), tls == 1, tls == 2
	return &a, err
}

func (s *store) agent(ctx context.Context, name string) (*Agent, error) {
	return agentIn(ctx, s.db, name)
}

// still refuses if the inventory no longer has the agent as it is here, in force.
func (a *Agent) still(ctx context.Context, tx *sql.Tx) error {
	now, err := agentIn(ctx, tx, a.Name)
	switch {
	case errors.Is(err, ErrNotFound):
		return a.changed()
	case err != nil:
		return err
	case now.Status != Active:
		return refuse("E9", "agent %s is %s", a.Name, now.Status)
	case *now != *a:
		return a.changed()
	}
	return nil
}

func (a *Agent) changed() error {
	return refuse("E9", "agent %s was changed in the inventory meanwhile: begin again", a.Name)
}

func agentIn(ctx context.Context, q queryer, name string) (*Agent, error) {
	a, err := scanAgent(q.QueryRowContext(ctx, "SELECT "+agentColumns+" FROM agent WHERE name = ?", name))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("agent %.80q: %w", name, ErrNotFound)
	}
	return a, err
}

func (s *store) agents(ctx context.Context) ([]*Agent, error) {
	return list(ctx, s.db, func(r *sql.Rows) (*Agent, error) { return scanAgent(r) }, "SELECT "+agentColumns+" FROM agent ORDER BY name")
}

// setStatus suspends, resumes or retires an agent. Whatever is not active has
// its certificates revoked. A retired agent stays retired.
func (s *store) setStatus(ctx context.Context, name, status string, now time.Time) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		a, err := agentIn(ctx, tx, name)
		if err != nil {
			return err
		}
		if status != Active && status != Suspended && status != Retired || a.Status == Retired && status != Retired {
			return fmt.Errorf("agent %s: %w: from %s to %.16q is not possible", name, ErrInvalid, a.Status, status)
		}
		if _, err := tx.ExecContext(ctx, "UPDATE agent SET status = ? WHERE name = ?", status, name); err != nil {
			return err
		}
		if status != Active {
			if _, err := tx.ExecContext(ctx, "UPDATE certificate SET revoked = ?, reason = 5 WHERE agent = ? AND revoked IS NULL AND not_after > ?", now.Unix(), name, now.Unix()); err != nil {
				return err // 5 is cessationOfOperation
			}
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Agent: name, Device: a.Device, Detail: "agent is " + status})
	})
}

func (s *store) addPolicy(ctx context.Context, p Policy, now time.Time) error {
	doc, err := strictjson.Marshal(p.Approved)
	if err != nil {
		return err
	}
	return s.inTx(ctx, func(tx *sql.Tx) error {
		if p.Device != "*" {
			var known bool
			if err := tx.QueryRowContext(ctx, "SELECT EXISTS(SELECT 1 FROM device WHERE id = ?)", p.Device).Scan(&known); err != nil {
				return err
			}
			if !known {
				return fmt.Errorf("policy %s: its device %.80q is %w in the inventory", p.Approved.Name, p.Device, ErrNotFound)
			}
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO policy(name, device, document, retired, created) VALUES(?, ?, ?, 0, ?)", p.Approved.Name, p.Device, doc, now.Unix())
		if err := constraint(err, "policy "+p.Approved.Name); err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Device: p.Device, Detail: "policy " + p.Approved.Name + " approved"})
	})
}

func (s *store) retirePolicy(ctx context.Context, name string, now time.Time) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, "UPDATE policy SET retired = 1 WHERE name = ?", name)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil {
			return err
		} else if n != 1 {
			return fmt.Errorf("policy %.80q: %w", name, ErrNotFound)
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Detail: "policy " + name + " retired"})
	})
}

func (s *store) policies(ctx context.Context) ([]Policy, error) {
	return list(ctx, s.db, func(r *sql.Rows) (p Policy, err error) {
		var doc []byte
		if err = r.Scan(&p.Device, &doc, &p.Retired); err == nil {
			err = strictjson.Unmarshal(doc, maxRequest, &p.Approved)
		}
		return p, err
	}, "SELECT device, document, retired FROM policy ORDER BY created DESC, name")
}

// policiesFor returns the policies in force for a device, the newest first.
func (s *store) policiesFor(ctx context.Context, device string) ([]attest.ApprovedPolicy, error) {
	all, err := s.policies(ctx)
	out := []attest.ApprovedPolicy{}
	for _, p := range all {
		if !p.Retired && (p.Device == "*" || p.Device == device) {
			out = append(out, p.Approved)
		}
	}
	return out, err
}

func (s *store) events(ctx context.Context, after int64, limit int) ([]Event, error) {
	return list(ctx, s.db, func(r *sql.Rows) (e Event, err error) {
		var micros int64
		err = r.Scan(&e.ID, &micros, &e.Kind, &e.Agent, &e.Device, &e.Check, &e.Detail, &e.Evidence)
		e.Time = time.UnixMicro(micros).UTC()
		for _, text := range []*string{&e.Agent, &e.Detail} {
			*text = strings.ToValidUTF8(*text, "\ufffd") // one that was not could not be shown at all
		}
		return e, err
	}, "SELECT id, time, kind, agent, device, check_id, detail, evidence FROM event WHERE id > ? ORDER BY id LIMIT ?", after, limit)
}
