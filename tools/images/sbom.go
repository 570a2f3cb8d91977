package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	xmodule "golang.org/x/mod/module"
)

// module is the product's.
const module = "github.com/signet-ca/signet"

const noAssertion = "NOASSERTION"

// The parts of SPDX 2.3 that are used here (specification, clauses 6, 7 and 11).
type (
	spdxDocument struct {
		SPDXVersion       string             `json:"spdxVersion"`
		DataLicense       string             `json:"dataLicense"`
		SPDXID            string             `json:"SPDXID"`
		Name              string             `json:"name"`
		DocumentNamespace string             `json:"documentNamespace"`
		CreationInfo      spdxCreation       `json:"creationInfo"`
		Packages          []spdxPackage      `json:"packages"`
		Relationships     []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		Name             string         `json:"name"`
		SPDXID           string         `json:"SPDXID"`
		VersionInfo      string         `json:"versionInfo"`
		DownloadLocation string         `json:"downloadLocation"`
		FilesAnalyzed    bool           `json:"filesAnalyzed"`
		Checksums        []spdxChecksum `json:"checksums,omitempty"`
		SourceInfo       string         `json:"sourceInfo,omitempty"`
		LicenseConcluded string         `json:"licenseConcluded"`
		LicenseDeclared  string         `json:"licenseDeclared"`
		CopyrightText    string         `json:"copyrightText"`
		Purpose          string         `json:"primaryPackagePurpose"`
		ExternalRefs     []spdxRef      `json:"externalRefs"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRelationship struct {
		Element string `json:"spdxElementId"`
		Related string `json:"relatedSpdxElement"`
		Type    string `json:"relationshipType"`
	}
)

// sbom tells what the binaries of an image consist of, by what the Go linker wrote into them and not by what go.mod would
// allow: SPDX 2.3 as JSON, with the licence of each module where its text is known.
func (c config) sbom(spec imageSpec, arch string, binaries map[string][]byte, e goEnvironment) ([]byte, error) {
	all := sha256.New()
	doc := spdxDocument{
		SPDXVersion:  "SPDX-2.3",
		DataLicense:  "CC0-1.0",
		SPDXID:       "SPDXRef-DOCUMENT",
		Name:         spec.name + " " + c.version + " linux/" + arch,
		CreationInfo: spdxCreation{c.created.Format(time.RFC3339), []string{"Tool: signet-images"}},
	}
	modules := make(map[string]spdxPackage) // by identifier
	var dependencies []spdxRelationship
	for _, name := range spec.binaries() {
		sum := sha256.Sum256(binaries[name])
		all.Write(sum[:])
		main := newPackage(module, c.version, "Apache-2.0")
		main.Name, main.SPDXID, main.Purpose = name, "SPDXRef-Binary-"+name, "APPLICATION"
		main.Checksums = []spdxChecksum{{"SHA256", hex.EncodeToString(sum[:])}}
		main.ExternalRefs[0].Locator += "#cmd/" + name
		doc.Packages = append(doc.Packages, main)
		doc.Relationships = append(doc.Relationships, spdxRelationship{doc.SPDXID, main.SPDXID, "DESCRIBES"})
		linked, err := linkedModules(binaries[name], e)
		if err != nil {
			return nil, err
		}
		for _, p := range linked {
			if other, ok := modules[p.SPDXID]; ok && other.Name+other.VersionInfo != p.Name+p.VersionInfo {
				return nil, fmt.Errorf("two modules have the SPDX identifier %s", p.SPDXID)
			}
			modules[p.SPDXID] = p
			dependencies = append(dependencies, spdxRelationship{main.SPDXID, p.SPDXID, "DEPENDS_ON"})
		}
	}
	doc.DocumentNamespace = "https://" + module + "/spdx/" + spec.name + "-" + hex.EncodeToString(all.Sum(nil)) // a name only: unique, as the binaries are
	for _, id := range slices.Sorted(maps.Keys(modules)) {
		doc.Packages = append(doc.Packages, modules[id])
	}
	doc.Relationships = append(doc.Relationships, dependencies...)
	out, err := json.MarshalIndent(doc, "", " ")
	return append(out, '\n'), err
}

// linkedModules are those in a binary, with the standard library as one of them, by their identifiers.
func linkedModules(binary []byte, e goEnvironment) ([]spdxPackage, error) {
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		return nil, err
	}
	all := []spdxPackage{newPackage("stdlib", strings.TrimPrefix(info.GoVersion, "go"), "BSD-3-Clause")}
	for _, dep := range info.Deps {
		m := replaced(dep)
		license, err := declaredLicense(e.GOMODCACHE, m)
		if err != nil {
			return nil, err
		}
		p := newPackage(m.Path, m.Version, license)
		if m.Sum != "" {
			p.SourceInfo = "go.sum " + m.Sum
		}
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b spdxPackage) int { return strings.Compare(a.SPDXID, b.SPDXID) })
	for i, p := range all[1:] {
		if p.SPDXID == all[i].SPDXID {
			return nil, fmt.Errorf("two modules have the SPDX identifier %s", p.SPDXID)
		}
	}
	return all, nil
}

func replaced(m *debug.Module) *debug.Module {
	if m.Replace != nil {
		return m.Replace
	}
	return m
}

var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

func newPackage(path, version, license string) spdxPackage {
	return spdxPackage{
		Name:             path,
		SPDXID:           "SPDXRef-Module-" + notInID.ReplaceAllString(path+"-"+version, "-"),
		VersionInfo:      version,
		DownloadLocation: noAssertion,
		LicenseConcluded: noAssertion, // that would be a lawyer's word
		LicenseDeclared:  license,
		CopyrightText:    noAssertion,
		Purpose:          "LIBRARY",
		// package-url: the type golang is written in lower case.
		ExternalRefs: []spdxRef{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + strings.ToLower(path) + "@" + url.QueryEscape(version)}},
	}
}

// declaredLicense reads the licences of a module from the texts in its top folder in the module cache. A module that is not
// there (vendored, or replaced by a folder) declares nothing that could be read.
func declaredLicense(cache string, m *debug.Module) (string, error) {
	path, err := xmodule.EscapePath(m.Path)
	if err != nil {
		return noAssertion, nil
	}
	version, err := xmodule.EscapeVersion(m.Version)
	if err != nil {
		return noAssertion, nil
	}
	dir := filepath.Join(cache, path+"@"+version)
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return noAssertion, nil
	} else if err != nil {
		return "", err
	}
	var found []string
	for _, entry := range entries {
		if entry.Type().IsRegular() && licenseFile.MatchString(entry.Name()) {
			text, err := os.ReadFile(filepath.Join(dir, entry.Name()))
			if err != nil {
				return "", err
			}
			found = append(found, licenses(text)...)
		}
	}
	if len(found) == 0 {
		return noAssertion, nil
	}
	slices.Sort(found)
	return strings.Join(slices.Compact(found), " AND "), nil
}

var licenseFile = regexp.MustCompile(`(?i)^(licen[sc]e|copying)([.-].*)?$`)

// licenses names the licences of a text by sentences that only they have. A file with several is under all of them.
func licenses(text []byte) []string {
	s := strings.Join(strings.Fields(strings.ToLower(string(text))), " ")
	var found []string
	add := func(id string, sentences ...string) {
		if !slices.ContainsFunc(sentences, func(sentence string) bool { return !strings.Contains(s, sentence) }) {
			found = append(found, id)
		}
	}
	add("Apache-2.0", "apache license", "version 2.0")
	add("MIT", "permission is hereby granted, free of charge, to any person obtaining a copy", "permission notice shall be included")
	add("ISC", "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted")
	add("MPL-2.0", "mozilla public license", "version 2.0")
	if strings.Contains(s, "redistribution and use in source and binary forms") {
		if strings.Contains(s, "neither the name") {
			found = append(found, "BSD-3-Clause")
		} else {
			found = append(found, "BSD-2-Clause")
		}
	}
	return found
}
