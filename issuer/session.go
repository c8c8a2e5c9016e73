package issuer

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/strictjson"
	"inkan/journal"
	"inkan/scope"
)

// How long a challenge may be answered, and how many may wait for an answer.
const (
	sessionTTL  = 60 * time.Second
	maxSessions = 4096
)

// session is an exchange that was begun. It lives in memory alone: after a
// restart its TLS channel is gone too. Whoever takes it out answers it, once,
// so nonce and secret are used once and a failed exchange stays failed (G1, Q3, A3).
type session struct {
	agent       string
	was         *Agent // as the inventory had it at the beginning
	device      *Device
	hello       *attest.Hello
	endorsement *attest.Endorsement
	challenge   *attest.Challenge
	secret      []byte
	span        *journal.Span // of the journal, since the testimony of the last time; nil: there was none
	size        int           // of what came of it, bytes
	expires     time.Time
	latest      time.Time // that expires may become
}

type sessions struct {
	mu   sync.Mutex
	open map[string]*session
}

func newSessions() *sessions { return &sessions{open: make(map[string]*session)} }

func (s *sessions) put(now time.Time, x *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) >= maxSessions {
		for id, old := range s.open {
			if now.After(old.expires) {
				delete(s.open, id)
			}
		}
	}
	if len(s.open) >= maxSessions {
		return &attest.Refusal{Check: "G7", Detail: "too many exchanges are under way: try again in a minute"}
	}
	s.open[string(x.challenge.Session)] = x
	return nil
}

// take removes the session: no second evidence finds it.
func (s *sessions) take(now time.Time, id []byte) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.open[string(id)]
	delete(s.open, string(id))
	if x == nil || now.After(x.expires) {
		return nil
	}
	return x
}

// party is whom a refusal in the decision log is about, as far as it is known.
type party struct{ agent, device string }

// who says whose exchange is under way, and leaves it there.
func (s *sessions) who(now time.Time, id []byte) (_ party, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.open[string(id)]
	if x == nil || now.After(x.expires) {
		return party{}, false
	}
	return party{x.agent, x.device.ID}, true
}

func refuse(check, format string, a ...any) error {
	return &attest.Refusal{Check: check, Detail: fmt.Sprintf(format, a...)}
}

// begin answers M1 with M2. It notes in who which device asks.
func (i *Issuer) begin(ctx context.Context, h *attest.Hello, from netip.Addr, who *party) (*attest.Challenge, error) {
	x := &session{agent: h.Agent, hello: h, expires: i.now().Add(sessionTTL), latest: i.now().Add(sessionMax)}
	ek, err := attest.SPKIDigest(h.EKPublic)
	if err != nil {
		return nil, refuse("E7", "%v", err)
	}
	if x.device, err = i.store.deviceByEK(ctx, ek); errors.Is(err, ErrNotFound) {
		return nil, refuse("E9", "no device with the EK %x is in the inventory", ek)
	} else if err != nil {
		return nil, err
	}
	who.device = x.device.ID
	if x.device.Unattested {
		return nil, refuse("U1", "device %s is a host without a TPM in the inventory", x.device.ID)
	}
	a, err := i.agentOf(ctx, h.Agent, x.device.ID, from)
	if err != nil {
		return nil, err
	}
	options, err := x.device.ekOptions(i.now())
	if err != nil {
		return nil, err
	}
	x.was = a
	if x.endorsement, err = attest.VerifyEK(h, options); err != nil {
		return nil, err
	}
	name, err := attest.CheckAK(h.AKPublic)
	if err != nil {
		return nil, err
	}
	if x.challenge, err = i.challenge(ctx, x.device, a); err != nil {
		return nil, err
	}
	if x.device.ak == nil {
		x.secret = random(attest.SecretSize)
		if x.challenge.Credential, err = attest.MakeCredential(x.endorsement, name, x.secret, rand.Reader); err != nil {
			return nil, err
		}
	} else if string(x.device.ak) != string(h.AKPublic) || string(x.device.srk) != string(h.SRKPublic) {
		return nil, refuse("E9", "device %s has another attestation key or storage root key on record: remove the device and add it anew if its TPM was cleared", x.device.ID)
	}
	x.demandJournal(name)
	return x.challenge, i.sessions.put(i.now(), x)
}

// agentOf finds an agent that may be certified: one of this device, in force,
// and one that may call from where the host does.
func (i *Issuer) agentOf(ctx context.Context, name, device string, from netip.Addr) (*Agent, error) {
	a, err := i.store.agent(ctx, name)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, refuse("E9", "agent %.64q is not in the inventory", name)
	case err != nil:
		return nil, err
	case a.Device != device:
		return nil, refuse("E9", "agent %s does not run on device %s", name, device)
	case a.Status != Active:
		return nil, refuse("E9", "agent %s is %s", name, a.Status)
	}
	return a, i.placed(a, from)
}

func (d *Device) ekOptions(now time.Time) (o attest.EKOptions, err error) {
	o = attest.EKOptions{AllowExpired: d.AllowExpired, Now: now}
	if d.Roots == "" {
		o.Pin, err = hex.DecodeString(d.EK)
		return o, err
	}
	roots, err := attest.ParseCertificates([]byte(d.Roots))
	if err != nil {
		return o, err
	}
	o.Roots = pool(roots)
	if d.CRLs != "" {
		o.RequireCRL = true
		if o.CRLs, err = attest.ParseCRLs([]byte(d.CRLs)); err != nil {
			return o, err
		}
	}
	if d.Intermediates != "" {
		o.Intermediates, err = attest.ParseCertificates([]byte(d.Intermediates))
	}
	return o, err
}

func random(n int) []byte {
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		panic(err) // crypto/rand ends the program before it would return an error
	}
	return b
}

func (i *Issuer) challenge(ctx context.Context, d *Device, a *Agent) (*attest.Challenge, error) {
	policies, err := i.store.policiesFor(ctx, d.ID)
	if err != nil {
		return nil, err
	}
	if len(policies) == 0 {
		return nil, refuse("P1", "no policy is approved for device %s: inkan issuer policy approve", d.ID)
	}
	c := &attest.Challenge{
		Session: random(attest.SessionSize), Nonce: random(attest.NonceSize), Expires: i.now().Add(sessionTTL).UTC().Truncate(time.Second),
		PCRs: attest.Union(policies), Policies: policies, PolicyKey: i.policyKey, PolicyRef: i.policyRef,
	}
	auth := i.auth
	if d.EpochMin > 0 {
		c.Epoch, auth = &attest.EpochDemand{AtLeast: d.EpochMin}, i.epochAuth
	}
	switch {
	case a.HSM:
		c.Keys = []attest.KeyRequest{{Purpose: attest.PurposeAction, Protection: attest.ProtectionHSM, Vendor: a.Vendor}}
	case a.Approver:
		c.Keys = []attest.KeyRequest{{Purpose: attest.PurposeAction, Mode: attest.ModeApprover, Template: attest.KeyTemplate(auth[attest.ModeApprover])}}
	default:
		c.Keys = []attest.KeyRequest{{Purpose: attest.PurposeAction, Template: attest.KeyTemplate(auth[attest.ModeLocal])}}
	}
	if a.Cancels {
		c.Keys = append(c.Keys, attest.KeyRequest{Purpose: attest.PurposeCancel, Template: attest.KeyTemplate(auth[attest.ModeLocal])})
	}
	if a.Reserve != "" {
		c.Keys = append(c.Keys, attest.KeyRequest{Purpose: attest.PurposeReserve, Mode: attest.ModeReserve, Template: attest.KeyTemplate(auth[attest.ModeReserve])})
	}
	if a.TLSHSM {
		c.Keys = append(c.Keys, attest.KeyRequest{Purpose: attest.PurposeTLS, Protection: attest.ProtectionHSM})
	} else if a.TLS || a.Approver { // approvers are reached with it
		c.Keys = append(c.Keys, attest.KeyRequest{Purpose: attest.PurposeTLS, Template: attest.KeyTemplate(auth[attest.ModeLocal])})
	}
	return c, nil
}

// finish answers M3 with M4. The decision and its evidence are on disk before
// a certificate is made.
func (i *Issuer) finish(ctx context.Context, ev *attest.Evidence, binding []byte, from netip.Addr) (*attest.Grant, error) {
	x := i.sessions.take(i.now(), ev.Session)
	if x == nil {
		return nil, refuse("Q3", "there is no such exchange: it was answered, took longer than %s, or was never begun", sessionTTL)
	}
	a, err := i.agentOf(ctx, x.agent, x.device.ID, from)
	if err != nil {
		return nil, err
	}
	if *a != *x.was {
		return nil, a.changed()
	}
	auth := i.auth
	if x.challenge.Epoch != nil {
		auth = i.epochAuth
	}
	result, err := attest.Appraise(&attest.Expectation{
		Challenge: x.challenge, Binding: binding, Secret: x.secret, Endorsement: x.endorsement, AK: x.hello.AKPublic, SRK: x.hello.SRKPublic,
		AuthPolicies: auth, Clock: x.device.clock, Epoch: x.device.Epoch, Audit: x.device.audit, UnsafeClock: x.device.UnsafeClock, MinFirmware: uint64(x.device.MinFirmware), AppraisalNow: i.now(), VendorRoots: a.vendorRoots(),
	}, ev)
	if err != nil {
		return nil, err
	}
	books, err := x.accounted(ev)
	if err != nil {
		return nil, err
	}
	if err := i.appraised(ctx, x, ev, result, books); err != nil {
		return nil, err
	}
	if books != nil {
		i.metrics.unaccounted.Add(float64(len(books.Lost)))
	}
	return i.grant(ctx, a, x, result)
}

// appraised records an accepted appraisal, and what the device is held to from
// now on: its AK, its SRK, its clock.
func (i *Issuer) appraised(ctx context.Context, x *session, ev *attest.Evidence, r *attest.Result, books *journal.Report) error {
	doc, err := strictjson.Marshal(ev)
	if err != nil {
		return err
	}
	digest, clock := fmt.Sprintf("%x", r.EvidenceDigest()), r.Clock()
	var audit sql.NullInt64
	var testimony []byte
	if t := r.Testimony(); t != nil {
		id := journal.TestimonyID(ev.Audit.Attest)
		audit, testimony = sql.NullInt64{Int64: int64(t.Counter), Valid: true}, id[:]
	}
	return i.store.inTx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "INSERT OR IGNORE INTO evidence(sha256, document) VALUES(?, ?)", digest, doc); err != nil {
			return err
		}
		if err := x.unknownStill(ctx, tx); err != nil {
			return err
		}
		now, err := x.stands(ctx, tx, r)
		if err != nil {
			return err
		}
		if old := now.clock; old != nil && old.Resets == clock.Resets && old.Restarts == clock.Restarts {
			clock.Milliseconds = max(clock.Milliseconds, old.Milliseconds)
		}
		if now.audit != nil && audit.Valid && uint64(audit.Int64) < *now.audit {
			audit, testimony = sql.NullInt64{}, nil
		}
		_, err = tx.ExecContext(ctx, "UPDATE device SET ak = ?, srk = ?, clock_ms = ?, resets = ?, restarts = ?, epoch = max(epoch, ?), audit = coalesce(?, audit), testimony = coalesce(?, testimony) WHERE id = ?",
			x.hello.AKPublic, x.hello.SRKPublic, int64(clock.Milliseconds), clock.Resets, clock.Restarts, int64(r.Epoch()), audit, testimony, x.device.ID)
		if err := constraint(err, "attestation key"); errors.Is(err, ErrExists) {
			return refuse("E9", "%v", err)
		} else if err != nil {
			return err
		}
		if lost := unaccounted(books); lost != "" {
			if err := event(ctx, tx, Event{Time: r.Time(), Kind: "unaccounted", Agent: x.agent, Device: x.device.ID, Check: "C3", Detail: lost, Evidence: digest}); err != nil {
				return err
			}
		}
		return event(ctx, tx, Event{Time: r.Time(), Kind: "appraised", Agent: x.agent, Device: x.device.ID, Check: "P1",
			Detail: fmt.Sprintf("EK %s, policy %s, firmware %#x, epoch %d, %s", r.Endorsement(), r.Policy(), r.Firmware(), r.Epoch(), testified(r.Testimony(), books)), Evidence: digest})
	})
}

// stands holds an accepted appraisal against the inventory as it is now: while
// the exchange went on, another one of the same device may have ended, and an operator
// may have changed what it was begun with. It returns the device's record.
func (x *session) stands(ctx context.Context, tx *sql.Tx, r *attest.Result) (*Device, error) {
	now, err := deviceIn(ctx, tx, x.device.ID)
	if errors.Is(err, ErrNotFound) || err == nil && !now.same(x.device) {
		return nil, refuse("E9", "device %s was changed in the inventory meanwhile: begin again", x.device.ID)
	}
	if err != nil {
		return nil, err
	}
	known := func(is, was, shown []byte) bool { return bytes.Equal(is, shown) || is == nil && was == nil }
	if !known(now.ak, x.device.ak, x.hello.AKPublic) || !known(now.srk, x.device.srk, x.hello.SRKPublic) {
		return nil, refuse("E9", "device %s has another attestation key or storage root key on record by now", x.device.ID)
	}
	if old, clock := now.clock, r.Clock(); old != nil && (clock.Resets < old.Resets || clock.Resets == old.Resets && clock.Restarts < old.Restarts) {
		return nil, refuse("Q6", "the TPM counts %d resets and %d restarts, and it had %d and %d in an exchange that ended meanwhile", clock.Resets, clock.Restarts, old.Resets, old.Restarts)
	}
	if r.Epoch() < now.EpochMin {
		return nil, refuse("N3", "the epoch is %d, and at least %d is demanded by now: begin again", r.Epoch(), now.EpochMin)
	}
	var inForce bool
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM policy WHERE name = ? AND device IN ('*', ?) AND NOT retired", r.Policy(), x.device.ID).Scan(&inForce); err != nil {
		return nil, err
	}
	if !inForce {
		return nil, refuse("P1", "policy %s was retired meanwhile", r.Policy())
	}
	return now, nil
}

// cancelScope is the scope of the agent's key for cancels: the agent's own, but
// for what it may do.
func cancelScope(a *Agent) ([]byte, error) {
	s, err := scope.Parse([]byte(a.Scope))
	if err != nil {
		return nil, err
	}
	if s, err = s.CancelsOnly(); err != nil {
		return nil, err
	}
	return s.Canonical(), nil
}

// grant issues the agent's certificates from an appraisal's result.
func (i *Issuer) grant(ctx context.Context, a *Agent, x *session, r *attest.Result) (*attest.Grant, error) {
	if !r.Valid() {
		return nil, refuse("G1", "there is no appraisal")
	}
	ak, err := attest.KeyName(x.hello.AKPublic)
	if err != nil {
		return nil, err
	}
	policies, err := i.store.policiesFor(ctx, x.device.ID)
	if err != nil {
		return nil, err
	}
	g := &attest.Grant{Policies: policies}
	for _, k := range r.Keys() {
		o := order{profile: k.Purpose, key: k.PublicKey, agent: a, lifetime: i.config.lifetime}
		if k.Purpose != attest.PurposeTLS {
			o.profile, o.scope = profileAction, []byte(a.Scope)
			switch k.Purpose {
			case attest.PurposeCancel:
				if o.scope, err = cancelScope(a); err != nil {
					return nil, err
				}
			case attest.PurposeReserve:
				o.scope = []byte(a.Reserve)
			}
			o.attestation = &certext.Attestation{
				Policy: r.Policy(), EvidenceSHA256: fmt.Sprintf("%x", r.EvidenceDigest()), Time: r.Time().UTC().Truncate(time.Second),
				Protection: certext.ProtectionTPM, Mode: cmp.Or(k.Mode, attest.ModeLocal), AKName: hex.EncodeToString(ak), KeyName: hex.EncodeToString(k.Name), AuthPolicy: hex.EncodeToString(k.AuthPolicy),
				EK: r.Endorsement(), Device: x.device.ID,
			}
			if k.Protection == attest.ProtectionHSM {
				// The host's TPM vouches for the host alone: that the key is in the
				// HSM is what the host says, or what the HSM's maker does.
				o.attestation.Protection = certext.ProtectionHSMDeclared
				if k.Vendor != "" {
					o.attestation.Protection = certext.ProtectionHSMAttested
				}
			}
		}
		c, err := i.issue(ctx, o)
		if err != nil {
			return nil, err
		}
		g.Certificates, g.RenewAfter = append(g.Certificates, attest.Issued{Purpose: k.Purpose, Chain: [][]byte{c.Raw}}), i.renewal(c)
	}
	return g, nil
}

// renewal is when two thirds of what is left of a certificate's life are over.
func (i *Issuer) renewal(c *x509.Certificate) time.Time {
	now := i.now()
	return now.Add(c.NotAfter.Sub(now) * 2 / 3).UTC().Truncate(time.Second)
}

// refused writes a refusal to the decision log.
func (i *Issuer) refused(ctx context.Context, who party, ev *attest.Evidence, r *attest.Refusal) error {
	e := Event{Time: i.now(), Kind: "refused", Agent: clip(who.agent, 64), Device: who.device, Check: r.Check, Detail: clip(r.Detail, 512)}
	return i.store.inTx(ctx, func(tx *sql.Tx) error {
		if ev != nil {
			doc, err := strictjson.Marshal(ev)
			if err != nil {
				return err
			}
			digest, err := attest.EvidenceDigest(ev)
			if err != nil {
				return err
			}
			e.Evidence = fmt.Sprintf("%x", digest)
			if _, err := tx.ExecContext(ctx, "INSERT OR IGNORE INTO evidence(sha256, document) VALUES(?, ?)", e.Evidence, doc); err != nil {
				return err
			}
		}
		return event(ctx, tx, e)
	})
}

// clip cuts what a host sent to n bytes, and leaves it a text: a log with
// anything else could not be read as JSON.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "")
}
