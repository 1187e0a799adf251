"""The page is made of files beside the code."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("bn_cy.graph")
