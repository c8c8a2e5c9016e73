package scope

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"inkan/internal/strictjson"
)

// MaxStatement bounds a statement, in bytes: it is a leaf of the record.
const MaxStatement = 65_535

// TimeFormat is the form of times in statements: UTC, to the microsecond (RTS 25).
const TimeFormat = "2006-01-02T15:04:05.000000Z"

// Decisions.
const (
	DecisionPermit = "permit"
	DecisionDeny   = "deny"
)

// Digest is a SHA-256, in text base64url without padding.
type Digest [sha256.Size]byte

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, d[:]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Digest) UnmarshalText(b []byte) error {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(string(b))
	if err != nil || len(raw) != len(d) || len(b) != 43 {
		return errors.New("a SHA-256 in base64url without padding is expected (43 characters)")
	}
	copy(d[:], raw)
	return nil
}

// Counter is a statement's position in its record, from 1. In JSON it is a
// decimal string, since not every JSON number survives every reader (RFC 7493).
type Counter uint64

// MarshalText implements encoding.TextMarshaler.
func (c Counter) MarshalText() ([]byte, error) { return strconv.AppendUint(nil, uint64(c), 10), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Counter) UnmarshalText(b []byte) error {
	n, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != string(b) {
		return errors.New("a decimal count without leading zeros is expected")
	}
	*c = Counter(n)
	return nil
}

// Timestamp is a time in UTC to the microsecond.
type Timestamp struct{ Time time.Time }

// MarshalText implements encoding.TextMarshaler.
func (t Timestamp) MarshalText() ([]byte, error) {
	return t.Time.UTC().AppendFormat(nil, TimeFormat), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *Timestamp) UnmarshalText(b []byte) error {
	p, err := time.Parse(TimeFormat, string(b))
	if err != nil || p.Format(TimeFormat) != string(b) {
		return errors.New("a time such as 2026-07-27T09:30:00.123456Z is expected")
	}
	t.Time = p
	return nil
}

// Statement is what the device signs: the parsed action, who asks for it, under
// which certificate and scope it was decided, and its place in the record. The
// signer builds it; nothing in it but the action comes from the agent.
type Statement struct {
	Version     int         `json:"ver"`
	Issuer      string      `json:"iss"` // who issued the certificate
	Agent       string      `json:"sub"` // SPIFFE ID
	Audience    string      `json:"aud"`
	ID          string      `json:"jti"`
	Counter     Counter     `json:"ctr"`
	Previous    Digest      `json:"prev"` // SHA-256 of the statement before it; zero for the first
	Time        Timestamp   `json:"ts"`
	Expires     int64       `json:"exp"` // seconds since 1970
	Kind        Kind        `json:"act,omitzero"`
	Order       *Order      `json:"ord,omitzero"`
	Payment     *Payment    `json:"pay,omitzero"`
	Party       *Party      `json:"pty,omitzero"`
	Native      *Native     `json:"native,omitzero"`
	Authorized  []string    `json:"auth,omitempty"` // authorizations of controllers that came with the action: [Authorization]
	Event       string      `json:"evt,omitzero"`   // of an event, whose kind is act: the exact text of what is behind it
	Controls    Counter     `json:"ctl,omitzero"`   // number of the last entry before it whose effect lasts; absent: there is none
	Open        Counter     `json:"opn,omitzero"`   // number of the oldest order before it that is open and older than any window; absent: there is none
	Decision    Decision    `json:"scope"`
	Attestation Attestation `json:"att"`
	Clock       *Clock      `json:"clk,omitzero"`  // what the signer knew of its clock; absent: nothing
	Run         *Run        `json:"run,omitempty"` // how the process that asked was started; absent where it is not confined

	fact  fact   // what Event says; of ParseStatement
	lifts []Rule // limits that Authorized names; of ParseStatement
}

// Decision says under what the action was permitted, or by what it was denied.
type Decision struct {
	Decision    string        `json:"dec"`
	Certificate Digest        `json:"cert"`          // SHA-256 of the action certificate
	Scope       Digest        `json:"hash"`          // of the scope in that certificate
	Policy      *Digest       `json:"pol,omitempty"` // SHA-256 of the policy that it was checked against besides; absent: there was none
	Reference   *Reference    `json:"ref,omitzero"`
	Notional    *Amount       `json:"not,omitzero"`   // computed; absent where there is none
	Utilisation []Utilisation `json:"util,omitempty"` // of the limits over time, this action included
	Rule        Rule          `json:"rule,omitzero"`  // what denied
	Key         string        `json:"key,omitzero"`   // what the limit that denied is for, such as a currency
	Message     string        `json:"msg,omitzero"`   // why, for a person
}

// Amount is an amount of money.
type Amount struct {
	Amount   Decimal `json:"amt"`
	Currency string  `json:"ccy"`
}

// Reference is the reference price that was used.
type Reference struct {
	Price    Decimal   `json:"px"`
	Currency string    `json:"ccy"`
	Source   string    `json:"src"`
	Time     Timestamp `json:"ts"`
}

// Attestation says what stands behind the certificate.
type Attestation struct {
	Evidence string    `json:"evidence"` // SHA-256 of the evidence, lower-case hex
	Time     Timestamp `json:"ts"`       // of the appraisal
}

// Marshal returns the statement's one spelling (RFC 8785).
func (s *Statement) Marshal() ([]byte, error) {
	b, err := strictjson.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	if len(b) > MaxStatement {
		return nil, fmt.Errorf("statement: %d bytes, at most %d are allowed", len(b), MaxStatement)
	}
	return b, nil
}

// ParseStatement reads a statement and refuses any spelling but the one of
// [Statement.Marshal]. A permit holds a valid action.
func ParseStatement(b []byte) (*Statement, error) {
	var s Statement
	if err := strictjson.Unmarshal(b, MaxStatement, &s); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	again, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, errors.New("statement: is not in canonical form (RFC 8785)")
	}
	switch {
	case s.Version != 1:
		return nil, fmt.Errorf("statement: version %d, this program knows 1", s.Version)
	case s.Counter == 0:
		return nil, errors.New("statement: counters begin at 1")
	case (s.Counter == 1) != (s.Previous == Digest{}):
		return nil, errors.New("statement: only the first one has no predecessor")
	case s.Controls >= s.Counter:
		return nil, errors.New("statement: ctl is not the number of an earlier entry")
	case s.Open >= s.Counter:
		return nil, errors.New("statement: opn is not the number of an earlier entry")
	case s.Decision.Key != "" && (s.Decision.Decision != DecisionDeny || len(s.Decision.Key) > maxKey):
		return nil, errors.New("statement: key is what a limit that denied is for")
	case s.Event != "" && s.Decision.Decision != DecisionEvent:
		return nil, errors.New("statement: only an event has evt")
	case (len(s.Authorized) > 0 || s.Decision.Policy != nil) && s.Decision.Decision != DecisionPermit:
		return nil, errors.New("statement: only a permit has auth and pol")
	}
	if err := s.Clock.validate(); err != nil {
		return nil, err
	}
	switch s.Decision.Decision {
	case DecisionPermit:
		if s.Decision.Rule != "" || s.Decision.Message != "" {
			return nil, errors.New("statement: a permit names no rule that denied")
		}
		if r := s.Action().validate(); r != nil {
			return nil, fmt.Errorf("statement: %w", r)
		}
		list, err := parseAuthorizations(s.Authorized)
		if err != nil {
			return nil, fmt.Errorf("statement: %w", err)
		}
		for _, a := range list {
			s.lifts = append(s.lifts, a.Rule)
		}
	case DecisionDeny:
		if s.Decision.Rule == "" {
			return nil, errors.New("statement: a denial names its rule")
		}
	case DecisionEvent:
		if err := s.validEvent(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("statement: decision %s: permit, deny or event is expected", clipped(s.Decision.Decision))
	}
	return &s, nil
}

// Action returns the action that the statement is about. It shares memory with s.
func (s *Statement) Action() *Action {
	return &Action{ID: s.ID, Audience: s.Audience, Kind: s.Kind, Order: s.Order, Payment: s.Payment, Party: s.Party, Native: s.Native}
}

// Env returns what was known when the statement's action was checked, by the
// statement itself; attested is what its certificate says.
func (s *Statement) Env(attested time.Time) Env {
	return Env{Now: s.Time.Time, AttestedAt: attested, Reference: s.ReferencePrice(), Run: s.Run, Clock: s.Clock, Agent: s.Agent, Authorizations: s.Authorized}
}

// States says whether the statement states the grounds of a permit: policy and utilisation.
func (s *Statement) States(o *Grounds) bool {
	d := &s.Decision
	return slices.Equal(d.Utilisation, o.Utilisation) && (d.Policy == nil) == (o.Policy == nil) && (d.Policy == nil || *d.Policy == *o.Policy)
}

// ReferencePrice returns the reference price that the statement names, for the
// action's instrument; nil if it names none.
func (s *Statement) ReferencePrice() *ReferencePrice {
	r := s.Decision.Reference
	if r == nil {
		return nil
	}
	return &ReferencePrice{Instrument: s.Action().Instrument(), Price: r.Price, Currency: r.Currency, Source: r.Source, Time: r.Time.Time}
}

// StatesNotional says whether the statement's notional is the permit's.
func (s *Statement) StatesNotional(p *Permit) bool {
	amount, currency, ok := p.Notional()
	n := s.Decision.Notional
	return ok == (n != nil) && (n == nil || n.Amount == amount && n.Currency == currency)
}
